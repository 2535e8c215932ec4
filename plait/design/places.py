"""Every place of a model: which layer stands where, resolved, and under which address.

Addresses count letters in reading order, branches included: "A#2" is the third A of the model. A parallel slot is "par#0".
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plait.design.imports import OWN
from plait.design.layers import KINDS, LETTERS, RWKV7, Attention, Layer, Mixer
from plait.design.merges import MERGE_KINDS, Merge
from plait.design.pattern import Item, Letter, Parallel, PatternError, render
from plait.design.spelling import suggest
from plait.design.struct import convert, convert_kind
from plait.design.wrap import Wrap

if TYPE_CHECKING:
    from plait.design.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Place:
    """One layer of the model, all its numbers filled in."""

    address: str
    letter: str
    layer: Layer

    @property
    def wrap(self) -> Wrap:
        return self.layer.wrap


@dataclass(frozen=True, slots=True)
class ParallelPlace:
    """Branches side by side on one input; each is a chain."""

    address: str
    branches: tuple[tuple["Node", ...], ...]
    merge: Merge
    wrap: Wrap

    def widths(self, dim: int) -> tuple[int, ...]:
        """Channels that each branch gives to the merge, in a model of width `dim`."""
        return tuple(branch[0].layer.inner() if self.merge.at == "inner" else dim for branch in self.branches)  # type: ignore[union-attr]  # a mixer's place, as the resolver has seen to


Node = Place | ParallelPlace


def nodes(chain: tuple[Node, ...]) -> Iterator[Node]:
    """Everything in reading order, a parallel slot before what is in it."""
    for node in chain:
        yield node
        for branch in node.branches if isinstance(node, ParallelPlace) else ():
            yield from nodes(branch)


def pairs(before: tuple[Node, ...], after: tuple[Node, ...]) -> Iterator[tuple[Node, Node]]:
    """What stands in the same place of two chains, in reading order. Where one has branches and the other a layer, or other
    branches, what is in them has no counterpart."""
    for old, new in zip(before, after, strict=True):
        yield old, new
        if isinstance(old, ParallelPlace) and isinstance(new, ParallelPlace) and alike(old, new):
            for chain, other in zip(old.branches, new.branches, strict=True):
                yield from pairs(chain, other)


def alike(one: ParallelPlace, other: ParallelPlace) -> bool:
    """Whether each has as many branches as the other, of as many layers."""
    return [*map(len, one.branches)] == [*map(len, other.branches)]


def layers(chain: tuple[Node, ...]) -> Iterator[Place]:
    """Every layer in reading order."""
    return (node for node in nodes(chain) if isinstance(node, Place))


def prefixed(slots: tuple[Node, ...]) -> Iterator[tuple[str, Place]]:
    """Every layer with the beginning of its weights' names in the model: "slots.3.mixer."."""
    for i, node in enumerate(slots):
        yield from _inside(node, f"slots.{i}.mixer.")


def _inside(node: Node, prefix: str) -> Iterator[tuple[str, Place]]:
    if isinstance(node, Place):
        yield prefix, node
        return
    for b, branch in enumerate(node.branches):
        for i, part in enumerate(branch):
            yield from _inside(part, f"{prefix}branches.{b}.layers.{i}.")


def read_layer(data: Any, where: str) -> Layer:
    """A layer config from plain data."""
    return convert_kind(data, KINDS, where, OWN)


def paths(node: Node, path: str = "") -> dict[str, str]:
    """Addresses by the path that a layer of one slot has in it: "" for a slot of one layer, ".1.0" for a branch's first."""
    if isinstance(node, Place):
        return {path: node.address}
    addresses: dict[str, str] = {path: node.address}
    for b, branch in enumerate(node.branches):
        alone = len(branch) == 1
        for i, part in enumerate(branch):
            addresses |= paths(part, f"{path}.{b}" if alone else f"{path}.{b}.{i}")
    return addresses


class Resolver:
    """From a design's pattern, letters and overrides to its places."""

    def __init__(self, design: "ModelConfig"):
        self.design = design
        self.bound: dict[str, Layer] = LETTERS | design.layers
        self.seen: Counter[str] = Counter()
        self.left = dict(design.at)
        self.resolved: dict[tuple[str, bool, bool], Layer] = {}

    def slots(self) -> tuple[Node, ...]:
        slots = tuple(self._node(item, None) for item in self.design.chain)
        if self.left:
            from plait.design.model import nearest_place

            address = next(iter(self.left))
            known = [node.address for node in nodes(slots)]
            raise ValueError(f"at: there is no place {address!r}; {nearest_place(address, known)}")
        self._check_shared(slots)
        _check_given(slots)
        _check_values(slots)
        return slots

    def _address(self, name: str) -> str:
        self.seen[name] += 1
        return f"{name}#{self.seen[name] - 1}"

    def _node(self, item: Item, within: Merge | None) -> Node:
        """`within`: the merge of the parallel slot that it is in, if it is in one."""
        return self._place(item, within) if isinstance(item, Letter) else self._parallel(item)

    def _place(self, letter: Letter, within: Merge | None) -> Place:
        address = self._address(letter.name)
        change = self.left.pop(address, None)
        if change is not None:
            layer = overridden(self._bound(letter), change, f"at.{address}")
            return Place(address, letter.name, self._resolved(layer, within, f"at.{address}"))
        key = letter.name, within is not None, within is not None and within.at == "inner"
        if key not in self.resolved:  # a letter is one layer wherever nothing is changed
            self.resolved[key] = self._resolved(self._bound(letter), within, f"layer {letter.name!r}")
        return Place(address, letter.name, self.resolved[key])

    def _resolved(self, layer: Layer, within: Merge | None, where: str) -> Layer:
        """All its numbers and its wrap filled in. Raises ValueError where they do not fit."""
        asked = layer.wrap
        wrap = (asked or Wrap()).over(self.design.full_wrap)
        try:
            layer = layer.replace(wrap=_fitting(layer, wrap, within is not None)).resolve(self.design.dim)
            layer = _before_merge(layer, asked, within is not None and within.at == "inner")
            # raises for what is adapted and not there
            layer.adapters(self.design.dim, layer.wrap.width(self.design.dim))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return layer

    def _bound(self, letter: Letter) -> Layer:
        if letter.name in self.bound:
            return self.bound[letter.name]
        described = ", ".join(f"{name} ({type(layer).__name__})" for name, layer in self.bound.items())
        raise PatternError(
            self.design.pattern,
            letter.column,
            f"no layer is bound to {letter.name!r}; bind it in `layers`, or use one of {described}{OWN}",
        )

    def _parallel(self, item: Parallel) -> ParallelPlace:
        address = self._address("par")
        change = self.left.pop(address, {})
        merge, wrap = self._merge(item), self.design.full_wrap
        if not isinstance(change, dict) or set(change) - {"merge", "wrap"}:
            raise ValueError(f"at.{address}: a parallel slot has a 'merge' and a 'wrap' to change, got {change!r}")
        if "merge" in change:
            merge = self._named_merge(change["merge"], f"at.{address}.merge")
        if "wrap" in change:
            wrap = convert(change["wrap"], Wrap, f"at.{address}.wrap").over(wrap)
        if wrap.reads != "stream":
            raise ValueError(f"{address}: branches read the stream alone; give wrap.reads to the layers of other slots")
        if merge.at == "inner":
            for branch in item.branches:
                if len(branch) != 1 or not all(isinstance(item, Letter) for item in branch):
                    raise ValueError(f"{address}: a merge at inner takes one layer a branch, got {render(branch)!r}")
        branches = tuple(tuple(self._node(part, merge) for part in branch) for branch in item.branches)
        place = ParallelPlace(address, branches, merge, wrap.replace(value_residual=False))
        try:
            merge.check(place.widths(self.design.dim))
        except ValueError as error:
            raise ValueError(f"{address}: {error}") from None
        return place

    def _merge(self, item: Parallel) -> Merge:
        """The design's where the pattern names none or names the same kind; else the one bound to the name, or of that kind."""
        default, named = self.design.merge, self.design.merges
        if item.merge is None:
            return default
        if item.merge not in named and item.merge not in MERGE_KINDS:
            reason = f"unknown merge {item.merge!r}; {suggest(item.merge, {**MERGE_KINDS, **named})}"
            raise PatternError(self.design.pattern, item.merge_column, reason)
        if item.merge in named:
            return named[item.merge]
        return default if type(default) is MERGE_KINDS[item.merge] else MERGE_KINDS[item.merge]()

    def _named_merge(self, data: Any, where: str) -> Merge:
        if isinstance(data, str) and data in self.design.merges:
            return self.design.merges[data]
        return convert_kind(data, MERGE_KINDS, where)

    def _check_shared(self, slots: tuple[Node, ...]) -> None:
        first: dict[str, Place] = {}
        for place in layers(slots):
            if not place.layer.shared:
                continue
            other = first.setdefault(place.letter, place)
            own, theirs = (
                p.layer.replace(wrap=p.wrap.replace(norms=None, norm=None, factor=None)) for p in (place, other)
            )
            if own != theirs:
                raise ValueError(
                    f"{place.address} shares its weights with {other.address}, so it can differ in norms and factor alone; "
                    "bind another letter for a layer of its own"
                )


def _check_given(slots: tuple[Node, ...]) -> None:
    """What a slot gives to the next one, that one must be there for, and read as it reads the stream."""
    for here, after in zip(slots, (*slots[1:], None), strict=True):
        if here.wrap.gives != "stream" and (
            after is None or (after.wrap.reads, after.wrap.residual) != ("stream",) * 2
        ):
            reason = (
                "there is none" if after is None else f"{after.address} has a wrap.reads or wrap.residual of its own"
            )
            raise ValueError(f"{here.address} gives what comes out to the next slot (wrap.gives), but {reason}")


def _check_values(slots: tuple[Node, ...]) -> None:
    """Values are mixed with the first layer's of their kind, number by number."""
    attention: dict[str, Any] = {}
    rwkv7: dict[str, Any] = {}
    for place in layers(slots):
        layer = place.layer
        if isinstance(layer, Attention) and place.wrap.value_residual:
            attention[place.address] = layer.kv_heads, layer.head_dim
        if isinstance(layer, RWKV7) and (layer.value_residual or not rwkv7):
            rwkv7[place.address] = layer.heads, layer.head_dim
    for what, sizes in {"(kv_heads, head_dim)": attention, "(heads, head_dim)": rwkv7}.items():
        for address, own in sizes.items():
            first, theirs = next(iter(sizes.items()))
            if own != theirs:
                raise ValueError(
                    f"{address}: value residual mixes its values of {what} = {own} with those of {first}, {theirs}; "
                    "give both equal ones"
                )


def overridden(layer: Layer, change: Any, where: str) -> Layer:
    """`layer` with some fields changed; a change that names another kind is a new layer."""
    if isinstance(change, str):
        change = {"kind": change}
    if not isinstance(change, dict):
        raise ValueError(f"{where}: expected a mapping of fields to values, got {change!r}")
    data = layer.to_dict()
    if change.get("kind", data["kind"]) != data["kind"]:
        data = {}
    return read_layer(_joined(data, change), where)


def _joined(data: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` over `data`, mappings inside mappings too."""
    inner = {k: _joined(data[k], v) for k, v in change.items() if isinstance(v, dict) and isinstance(data.get(k), dict)}
    return data | change | inner


def _before_merge(layer: Layer, asked: Wrap | None, inner: bool) -> Layer:
    """A layer whose heads are merged before any projection has none of its own, and nothing behind it. asked: its own wrap."""
    name = type(layer).__name__
    if not inner:
        if isinstance(layer, Mixer) and not layer.out_proj:
            raise ValueError(f"{name}.out_proj: false is for the branches of a merge at inner")
        return layer
    if not isinstance(layer, Mixer):
        raise ValueError(f"{name} has no heads to merge; a merge at inner takes mixers, such as attention and mamba2")
    if asked is not None and (asked.norms in ("after", "both") or asked.factor not in (None, 1.0)):
        raise ValueError(
            f"{name}: a merge at inner has no place for a branch's factor or norm after it; give them to the slot"
        )
    return layer.replace(out_proj=False, wrap=layer.wrap.replace(norms="before", factor=1.0))


def _fitting(layer: Layer, wrap: Wrap, inside: bool) -> Wrap:
    """The wrap that a layer gets: what the design asks of all where the layer can have it; what itself asks it must."""
    name, own = type(layer).__name__, layer.wrap or Wrap()
    if own.value_residual and not isinstance(layer, Attention):
        raise ValueError(f"{name} has no values to mix with another layer's, so wrap.value_residual is for Attention")
    if inside and own.reads not in (None, "stream"):
        raise ValueError("a layer inside a branch reads what its branch reads; wrap.reads is for slots")
    if inside and (own.keep not in (None, 1.0) or own.residual not in (None, "stream")):
        raise ValueError("what layers inside a branch add is summed; wrap.keep and wrap.residual are for slots")
    if inside and own.gives not in (None, "stream"):
        raise ValueError("a layer inside a branch gives to its branch; wrap.gives is for slots")
    if not inside and wrap.gives != "stream" and (wrap.keep != 1 or wrap.residual != "stream"):
        raise ValueError("wrap.keep and wrap.residual say what is added to; with wrap.gives next nothing is")
    if not inside and wrap.reads != "stream" and wrap.residual == "normed":
        raise ValueError(
            "the embeddings beside the stream are no stream to add to: wrap.residual normed wants wrap.reads stream"
        )
    changes: dict[str, Any] = {}
    if not isinstance(layer, Attention):
        changes["value_residual"] = False
    if inside:
        changes |= {"reads": "stream", "keep": 1.0, "residual": "stream", "gives": "stream"}
    return wrap.replace(**changes)
