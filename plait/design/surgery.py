"""A design with some of its places changed."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from plait.design.layers import LETTERS, Layer, Mixer
from plait.design.model import ModelConfig
from plait.design.pattern import Item, Letter, Parallel, render
from plait.design.places import Node, ParallelPlace, Place, overridden, read_layer
from plait.design.struct import Struct
from plait.design.wrap import Wrap


def with_places(design: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """The design with other layers at some addresses. A change is a layer config, a kind, or a mapping of fields.

    A new layer goes by a letter that is bound to its kind; addresses after it may count differently.
    """
    for address in changes:
        design.place(address)  # raises for an address that does not exist
    return _Rewriter(design, changes).result()


class _Rewriter:
    def __init__(self, design: ModelConfig, changes: Mapping[str, Any]):
        self.design, self.changes = design, changes
        self.layers: dict[str, Layer] = dict(design.layers)
        self.at: dict[str, Any] = {}
        self.seen: Counter[str] = Counter()

    def result(self) -> ModelConfig:
        pairs = zip(self.design.chain, self.design.slots, strict=True)
        chain = tuple(self._item(item, node) for item, node in pairs)
        return self.design.replace(pattern=render(chain), layers=self.layers, at=self.at)

    def _item(self, item: Item, node: Node) -> Item:
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
        usual, kept = self.design.full_wrap, ("norms", "norm", "factor", "reads")
        own = {name: getattr(node.wrap, name) for name in kept if getattr(node.wrap, name) != getattr(usual, name)}
        return layer if layer.wrap is not None or not own else layer.replace(wrap=Wrap(**own))

    def _changed(self, layer: Layer) -> Letter:
        letter = self._letter(layer)
        address, bound = self._address(letter), (LETTERS | self.layers)[letter]
        if layer != bound:
            self.at[address] = layer.to_dict()
        return Letter(letter)

    def _layer(self, node: Node) -> Layer:
        where, change = f"swap {node.address}", self.changes[node.address]
        if isinstance(change, Layer) or isinstance(node, ParallelPlace):
            return read_layer(change.to_dict() if isinstance(change, Struct) else change, where)
        bound = (LETTERS | self.design.layers)[node.letter]
        own = self.design.at.get(node.address)
        return overridden(bound if own is None else overridden(bound, own, where), change, where)

    def _letter(self, layer: Layer) -> str:
        """A letter of this kind whose own settings the layer overrides or has; else a new one."""
        for name, bound in (*self.layers.items(), *((n, b) for n, b in LETTERS.items() if n not in self.layers)):
            if type(bound) is type(layer) and not bound.shared and set(bound.to_dict()) <= set(layer.to_dict()):
                return name
        first = next((n for n, bound in LETTERS.items() if type(bound) is type(layer)), type(layer).__name__[0].upper())
        name = next(n for n in (f"{first}{c}" for c in "abcdefghijklmnopqrstuvwxyz") if n not in LETTERS | self.layers)
        self.layers[name] = layer
        return name

    def _address(self, name: str) -> str:
        self.seen[name] += 1
        return f"{name}#{self.seen[name] - 1}"
