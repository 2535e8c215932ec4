"""A design with some of its places changed."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from plait.design.layers import LETTERS, Layer, Mixer
from plait.design.merges import MERGE_KINDS, Merge
from plait.design.model import ModelConfig
from plait.design.pattern import Chain, Item, Letter, Parallel, parse, render
from plait.design.places import Node, ParallelPlace, Place, nodes, overridden, read_layer
from plait.design.spelling import suggest
from plait.design.struct import Struct, convert_kind
from plait.design.wrap import Wrap


def with_places(design: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """The design with other layers at some addresses. A change is a layer config, a kind, or a mapping of fields; for branches
    side by side a pattern, "[D|A]", or a mapping with `branches`, a layer each, and `merge`; for what is in a parallel slot
    alone, its address.

    A new layer goes by a letter that is bound to its kind; addresses after it may count differently.
    """
    for address in changes:
        design.place(address)  # raises for an address that does not exist
    return _Rewriter(design, changes).result()


SLOT = ("norms", "norm", "factor", "keep", "residual", "gives", "reads")  # of a wrap: what a slot has, and no branch


def _inside(wrap: Wrap) -> dict[str, Any]:
    """What of a wrap has to change for a layer in a branch to have no factor and no norm behind it."""
    plain = {"norms": "before", "factor": 1.0, "keep": 1.0, "residual": "stream", "gives": "stream"}
    return {name: value for name, value in plain.items() if getattr(wrap, name) not in (value, "none")}


def standing(node: Node) -> list[Place]:
    """The layers that stand here: one, or those that are a parallel slot's branches by themselves."""
    if isinstance(node, Place):
        return [node]
    return [branch[0] for branch in node.branches if len(branch) == 1 and isinstance(branch[0], Place)]


def _goes_by(layer: Layer, bound: Layer) -> bool:
    """Whether a letter bound to this may stand for the layer: of its kind, and a window only for a window."""
    seen = getattr(bound, "window", None) is None, getattr(layer, "window", None) is None
    return type(bound) is type(layer) and not bound.shared and seen[0] is seen[1]


class _Rewriter:
    def __init__(self, design: ModelConfig, changes: Mapping[str, Any]):
        self.design, self.changes = design, changes
        self.layers: dict[str, Layer] = dict(design.layers)
        self.merges: dict[str, Merge] = dict(design.merges)
        self.at: dict[str, Any] = {}
        self.seen: Counter[str] = Counter()

    def result(self) -> ModelConfig:
        pairs = zip(self.design.chain, self.design.slots, strict=True)
        chain = tuple(self._item(item, node) for item, node in pairs)
        return self.design.replace(pattern=render(chain), layers=self.layers, merges=self.merges, at=self.at)

    def _item(self, item: Item, node: Node) -> Item:
        branches = self._branches(node)
        if branches is not None:
            return self._parallel(node, *branches)
        layer = self._layer(node) if node.address in self.changes and not self._only_wrap(node) else None
        if layer is not None and not self._equal(layer, node):
            return self._changed(self._as_wrapped(layer, node))
        address = self._address("par" if isinstance(item, Parallel) else item.name)
        change = dict(self.design.at.get(node.address, {}))
        if node.address in self.changes and layer is None:
            change |= self.changes[node.address]
        if change:
            self.at[address] = change
        if isinstance(item, Letter) or not isinstance(node, ParallelPlace):
            return item
        branches = zip(item.branches, node.branches, strict=True)
        parts = tuple(tuple(self._item(i, n) for i, n in zip(chain, inner, strict=True)) for chain, inner in branches)
        return Parallel(parts, item.merge)

    def _branches(self, node: Node) -> tuple[list[Layer], str | None] | None:
        """The layers that are to stand side by side here, and the name of their merge; None where none are."""
        change, where = self.changes.get(node.address), f"swap {node.address}"
        if isinstance(change, str) and change.lstrip().startswith("["):
            slot, *more = parse(change)
            if more or not isinstance(slot, Parallel):
                raise ValueError(f"{where}: {change!r} is more than one slot; expected branches such as '[D|A]'")
            return [self._lettered(branch, node, where) for branch in slot.branches], slot.merge
        if not isinstance(change, Mapping) or "branches" not in change:
            return None
        if unknown := set(change) - {"branches", "merge"}:
            raise ValueError(f"{where}: branches side by side have 'branches' and a 'merge', not {min(unknown)!r}")
        layers = [self._named(branch, node, where) for branch in change["branches"]]
        if len(layers) < 2:
            raise ValueError(f"{where}: one branch alone is not parallel; give two layers or more, or the layer itself")
        return layers, self._merge(change.get("merge"), where)

    def _lettered(self, branch: Chain, node: Node, where: str) -> Layer:
        """What a branch's one letter stands for; the letter of a layer that is here is that layer."""
        item, *more = branch
        if more or not isinstance(item, Letter):
            raise ValueError(f"{where}: a branch here is one layer, got {render(branch)!r}")
        letter = item.name
        for place in standing(node):
            if place.letter == letter:
                return place.layer
        bound = LETTERS | self.design.layers
        if letter not in bound:
            raise ValueError(f"{where}: no layer is bound to {letter!r}; {suggest(letter, bound)}")
        return bound[letter]

    def _named(self, change: Any, node: Node, where: str) -> Layer:
        """A layer config, a kind, a mapping, or the address of what is here."""
        if isinstance(change, str) and "#" in change:
            here = {inner.address: inner.layer for inner in nodes((node,)) if isinstance(inner, Place)}
            if change not in here:
                raise ValueError(f"{where}: {change!r} does not stand here; {suggest(change, here)}")
            return here[change]
        return read_layer(change.to_dict() if isinstance(change, Struct) else change, where)

    def _merge(self, data: Any, where: str) -> str | None:
        """The name that a merge goes by: None for the design's, else one that is bound to it, or a new one."""
        if data is None:
            return None
        merge = self.merges.get(data) if isinstance(data, str) else None
        if merge is None:
            merge = convert_kind(data.to_dict() if isinstance(data, Struct) else data, MERGE_KINDS, f"{where}.merge")
        if merge == self.design.merge:
            return None
        known = {name: kind() for name, kind in MERGE_KINDS.items()} | self.merges
        for name, bound in known.items():
            if bound == merge:
                return name
        kind = next(name for name, kind in MERGE_KINDS.items() if kind is type(merge))
        name = next(n for n in (f"{kind}_{c}" for c in "abcdefghijklmnopqrstuvwxyz") if n not in self.merges)
        self.merges[name] = merge
        return name

    def _parallel(self, node: Node, branches: list[Layer], merge: str | None) -> Parallel:
        """A slot of these branches, which sits on the stream as what was here did."""
        address, usual, wrap = self._address("par"), self.design.full_wrap, node.wrap
        own = {name: getattr(wrap, name) for name in SLOT if getattr(wrap, name) != getattr(usual, name)}
        if own:
            self.at[address] = {"wrap": Wrap(**own).to_dict()}
        return Parallel(tuple((self._branch(layer, node),) for layer in branches), merge)

    def _branch(self, layer: Layer, node: Node) -> Letter:
        """A layer in a branch, on which only the slot's wrap acts. What is here keeps its letter."""
        same = next((place for place in standing(node) if self._equal(layer.replace(wrap=None), place)), None)
        if same is None:
            inside = _inside(self.design.full_wrap)
            return self._changed(layer.replace(wrap=Wrap(**inside) if inside else None))
        change = dict(self.design.at.get(same.address, {}))
        if inside := _inside(same.wrap):
            change["wrap"] = {**change.get("wrap", {}), **inside}
        address = self._address(same.letter)
        if change:
            self.at[address] = change
        return Letter(same.letter)

    def _only_wrap(self, node: Node) -> bool:
        """Whether a parallel slot keeps its branches: its merge or wrap is changed."""
        change = self.changes[node.address]
        return isinstance(node, ParallelPlace) and isinstance(change, dict) and set(change) <= {"merge", "wrap"}

    def _equal(self, layer: Layer, node: Node) -> bool:
        """Whether a layer is what stands there already, however it is spelled."""
        if not isinstance(node, Place) or type(layer) is not type(node.layer):
            return False
        wrap = (layer.wrap or Wrap()).over(node.wrap)
        placed = {"out_proj": node.layer.out_proj} if isinstance(node.layer, Mixer) else {}  # where it stands says so
        return layer.replace(wrap=wrap, **placed).resolve(self.design.dim) == node.layer

    def _as_wrapped(self, layer: Layer, node: Node) -> Layer:
        """A layer that says nothing of its wrap sits on the stream as the one before it did."""
        usual, kept = self.design.full_wrap, ("norms", "norm", "factor", "reads", "residual")
        own = {name: getattr(node.wrap, name) for name in kept if getattr(node.wrap, name) != getattr(usual, name)}
        return layer if layer.wrap is not None or not own else layer.replace(wrap=Wrap(**own))

    def _changed(self, layer: Layer) -> Letter:
        """A layer that is new here, with weights of its own, whoever shared those of the one before it."""
        layer = layer.replace(shared=False, adapter_rank=None, adapted=())
        letter = self._letter(layer)
        address, bound = self._address(letter), (LETTERS | self.layers)[letter]
        if not self._same_without_wrap(layer, bound):
            self.at[address] = layer.to_dict()
        elif layer.wrap is not None and layer.wrap != bound.wrap:
            self.at[address] = {"wrap": layer.wrap.to_dict()}
        return Letter(letter)

    def _same_without_wrap(self, layer: Layer, bound: Layer) -> bool:
        plain = layer.replace(wrap=None).resolve(self.design.dim)
        try:
            return plain == bound.replace(wrap=None).resolve(self.design.dim)
        except ValueError:  # a default that cannot stand in so wide a model, and so does not stand here
            return False

    def _layer(self, node: Node) -> Layer:
        where, change = f"swap {node.address}", self.changes[node.address]
        if isinstance(change, str) and "#" in change:
            return self._named(change, node, where).replace(wrap=None)
        if isinstance(change, Layer) or isinstance(node, ParallelPlace):
            return read_layer(change.to_dict() if isinstance(change, Struct) else change, where)
        bound = (LETTERS | self.design.layers)[node.letter]
        own = self.design.at.get(node.address)
        return overridden(bound if own is None else overridden(bound, own, where), change, where)

    def _letter(self, layer: Layer) -> str:
        """A letter of this kind whose own settings the layer overrides or has; else a new one."""
        for name, bound in (*self.layers.items(), *((n, b) for n, b in LETTERS.items() if n not in self.layers)):
            if _goes_by(layer, bound) and set(bound.to_dict()) <= set(layer.to_dict()):
                return name
        first = next((n for n, bound in LETTERS.items() if type(bound) is type(layer)), type(layer).__name__[0].upper())
        name = next(n for n in (f"{first}{c}" for c in "abcdefghijklmnopqrstuvwxyz") if n not in LETTERS | self.layers)
        self.layers[name] = layer
        return name

    def _address(self, name: str) -> str:
        self.seen[name] += 1
        return f"{name}#{self.seen[name] - 1}"
