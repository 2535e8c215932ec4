"""Gates of parallel slots: distilling prices attention's weight, and a slot whose gate has left it becomes its new branch."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.design.layers import Attention
from plait.design.merges import Sum
from plait.design.model import ModelConfig
from plait.design.places import ParallelPlace, layers, nodes, pairs
from plait.design.surgery import standing
from plait.layers import Channels
from plait.model import LanguageModel, Loss, Objective
from plait.model.objective import Batch
from plait.model.surgery import swap

LEFT = 0.1  # a gate that gives attention less has left it


@dataclass(frozen=True, slots=True)
class Gate:
    """A parallel slot of one attention and other mixers whose sum has learned weights. attention: its branch."""

    address: str
    attention: int
    branches: tuple[str, ...]

    @property
    def new(self) -> tuple[str, ...]:
        return tuple(address for i, address in enumerate(self.branches) if i != self.attention)


def gates(design: ModelConfig) -> list[Gate]:
    """All of a design, in order."""
    found = []
    for node in nodes(design.slots):
        if not isinstance(node, ParallelPlace) or not isinstance(node.merge, Sum) or node.merge.fixed:
            continue
        branches = standing(node)
        attention = [i for i, place in enumerate(branches) if isinstance(place.layer, Attention)]
        if len(attention) == 1 and len(branches) == len(node.branches):
            found.append(Gate(node.address, attention[0], tuple(place.address for place in branches)))
    return found


def weights_of(model: LanguageModel, gate: Gate) -> list[Tensor]:
    """What each branch is multiplied by."""
    merge: Any = model.place(gate.address).merge
    return merge.weights()


class Priced(Objective):
    """Another objective, and `price` nats a position for the weight of each gate's attention, its sign left out."""

    def __init__(self, objective: Objective, price: float):
        super().__init__(objective.model)
        self.objective, self.price = objective, price
        self.gates = gates(objective.model.design)

    def count(self, batch: Batch) -> Tensor:
        return self.objective.count(batch)

    def forward(self, batch: Batch, channels: Channels | None = None) -> Loss:
        loss = self.objective(batch, channels)
        if not torch.is_grad_enabled():
            return loss
        weights = torch.stack([weights_of(self.model, gate)[gate.attention].abs() for gate in self.gates])
        return loss.plus({"attention": self.price * weights.sum()})


@torch.no_grad()
def to_prune(model: LanguageModel, attention: int | None) -> list[str]:
    """The parallel slots that are to lose their attention, those that weigh it least: all but so many as leave `attention`
    layers of it in the model; None: those whose gates have left it."""
    found = gates(model.design)
    weights = {gate.address: abs(float(weights_of(model, gate)[gate.attention])) for gate in found}
    if attention is None:
        return [address for address, value in weights.items() if value < LEFT]
    everywhere = sum(isinstance(node.layer, Attention) for node in layers(model.design.slots))
    least = sorted(weights, key=weights.__getitem__)[: max(0, everywhere - attention)]
    return [gate.address for gate in found if gate.address in least]


@torch.no_grad()
def pruned(model: LanguageModel, addresses: list[str]) -> LanguageModel:
    """A copy in which parallel slots have lost their attention. The new branch's weight goes into its output projection, so
    that nothing else is lost.

    Raises ValueError for a slot that has no gate, or more than one new branch.
    """
    known, stay = {gate.address: gate for gate in gates(model.design)}, dict[str, str]()
    for address in addresses:
        gate = known.get(address)
        if gate is None or len(gate.new) != 1:
            model.design.place(address)  # raises for an address that does not exist
            raise ValueError(f"{address} has no gate between attention and one new mixer, as a converted [D|A] has")
        stay[address] = gate.new[0]
    student = swap(copy.deepcopy(model), stay)
    for old, new in pairs(model.design.slots, student.design.slots):
        if old.address in stay:
            gate = known[old.address]
            layer: Any = student.place(new.address)
            for parameter in getattr(layer, layer.projection).parameters():
                parameter.mul_(weights_of(model, gate)[1 - gate.attention])
    return student
