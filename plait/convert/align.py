"""Alignment: every new layer learns to give what the layer in its place gave, all at once, in one pass of the teacher.

The teacher reads a batch. Each replaced slot's stream is what the student's slot there is given, and what the teacher's slot
made of it is what the student's is held against (as in RADLADS, arXiv 2505.03005, and MOHAWK, arXiv 2408.10189). So no layer
waits for another, no gradient passes from one to the next, and one backward pass serves them all.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.convert.gates import gates
from plait.design.model import ModelConfig
from plait.design.places import nodes
from plait.layers import Channels
from plait.layers.context import Context
from plait.model import LanguageModel, Loss, Objective, SquaredError
from plait.model.loss import loss_of
from plait.model.objective import Batch
from plait.model.surgery import swap
from plait.train.step import autocast

# A slot of the teacher, the stream (b, t, d) that it read, the call's context, and what it made of the stream.
Call = tuple[int, Tensor, Context, Tensor]


def slots_of(design: ModelConfig, addresses: Iterable[str]) -> list[int]:
    """The slots that these layers are in, in order."""
    wanted = set(addresses)
    return [i for i, slot in enumerate(design.slots) if wanted & {node.address for node in nodes((slot,))}]


def walk(model: LanguageModel, batch: Any, slots: Iterable[int]) -> Iterator[Call]:
    """What these slots read and give, one after the other, without gradients. No slot after the last of them is run, and no
    stream is held once the next has been asked for."""
    wanted = set(slots)
    with torch.no_grad():
        x, context = model.stream(batch.inputs, cu_seqlens=batch.cu_seqlens)
    for slot in range(max(wanted, default=-1) + 1):
        with torch.no_grad():
            y, _ = model.run(x, context, slots=[slot])
        if slot in wanted:
            yield slot, x, context, y
        x = y


@torch.no_grad()
def powers(teacher: LanguageModel, slots: Sequence[int], batches: Iterable[Any], precision: str) -> dict[int, float]:
    """Mean square of what each slot adds to its stream, per number: what its error is measured by."""
    squares, numbers = {slot: torch.zeros((), dtype=torch.float64, device=teacher.device) for slot in slots}, 0
    with autocast(teacher.device, precision):
        for batch in batches:
            for slot, x, _, y in walk(teacher, batch.to(teacher.device), slots):
                squares[slot] += (y - x).square().mean(-1, dtype=torch.float64).sum()
            numbers += batch.inputs.shape[:2].numel()
    if not numbers:
        raise ValueError("alignment: there is no text to measure the teacher's layers on")
    tiny = torch.finfo(torch.float32).tiny
    return {slot: max(float(square) / numbers, tiny) for slot, square in squares.items()}


def each_alone(model: LanguageModel, slots: Iterable[int]) -> dict[int, list[tuple[str, LanguageModel]]]:
    """By slot, the addresses of what is run there and the models to run: `model` itself, or where a gate weighs attention and
    new branches one in which that place is a branch alone, of the same weights."""
    found: dict[int, list[tuple[str, LanguageModel]]] = {slot: [] for slot in slots}
    for gate in gates(model.design):
        (slot,) = slots_of(model.design, [gate.address])
        if slot in found:
            found[slot] += [(new, swap(model, {gate.address: new})) for new in gate.new]
    return {slot: runs or [(model.design.slots[slot].address, model)] for slot, runs in found.items()}


class Alignment(Objective):
    """Squared error of what each replaced slot adds to the teacher's stream, as a share of `powers`: 1 is as far off as
    adding nothing. The loss is the mean over the slots, and each one's own is a part of it, by the address in the student.
    Of a slot in which attention has stayed beside new branches, each of these is held against it, alone.

    Only the replaced slots are run, so give all other weights the rate 0. Every position counts, with or without a target.
    """

    def __init__(self, model: LanguageModel, teacher: LanguageModel, powers: Mapping[int, float]):
        super().__init__(model)
        self.teacher, self.powers = teacher.eval().requires_grad_(False), dict(powers)
        self.runs = each_alone(model, self.powers)

    def train(self, mode: bool = True) -> "Alignment":
        super().train(mode)
        self.teacher.eval()
        return self

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.inputs.shape[:2].numel())

    def forward(self, batch: Batch, channels: Channels | None = None) -> Loss:
        sent, parts, own, mine = Channels(), dict[str, Tensor](), list[Tensor](), None
        runs = sum(map(len, self.runs.values()))
        for slot, x, context, theirs in walk(self.teacher, batch, self.powers):
            mine = mine or context.slot()()
            mine.keep(context)  # what the teacher's slots have left is there for ours, but not the other way round
            for address, model in self.runs[slot]:
                ours, _ = model.run(x, mine, slots=[slot], channels=sent)
                error = loss_of(ours, SquaredError(theirs)).total / (self.powers[slot] * runs)
                own.append(error)
                parts[address] = error.detach()
        loss = Loss(torch.stack(own).sum(), self.count(batch).to(own[0].device), parts).plus(sent.losses_by_name())
        if channels is not None:
            channels.join(sent)
        return loss
