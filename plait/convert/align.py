"""Alignment: every new layer learns to give what the layer in its place gave, all at once, in one pass of the teacher.

The teacher reads a batch. Each replaced slot's stream is what the student's slot there is given, and what the teacher's slot
made of it is what the student's is held against (as in RADLADS, arXiv 2505.03005, and MOHAWK, arXiv 2408.10189). So no layer
waits for another, no gradient passes from one to the next, and one backward pass serves them all.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plait.design.model import ModelConfig
from plait.design.places import nodes
from plait.layers import Channels
from plait.layers.context import Context
from plait.model import LanguageModel, Loss, Objective, SquaredError
from plait.model.loss import loss_of
from plait.model.objective import Batch
from plait.train.step import autocast

Call = tuple[
    Tensor, Context, Tensor
]  # the stream (b, t, d) that a slot of the teacher read, the call's context, its output


def slots_of(design: ModelConfig, addresses: Iterable[str]) -> list[int]:
    """The slots that these layers are in, in order."""
    wanted = set(addresses)
    return [i for i, slot in enumerate(design.slots) if wanted & {node.address for node in nodes((slot,))}]


@contextmanager
def calls_of(model: LanguageModel, slots: Sequence[int]) -> Iterator[dict[int, Call]]:
    """Inside, what these slots read and give in the model's last call is in the mapping, by slot."""
    calls: dict[int, Call] = {}

    def watch(slot: int) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], made: tuple[Tensor, Any]) -> None:
            calls[slot] = given[0], given[1], made[0]

        return hook

    hooks = [model.slots[slot].register_forward_hook(watch(slot)) for slot in slots]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def powers(teacher: LanguageModel, slots: Sequence[int], batches: Iterable[Any], precision: str) -> dict[int, float]:
    """Mean square of what each slot adds to its stream, per number: what its error is measured by."""
    squares, numbers = dict.fromkeys(slots, 0.0), 0
    with calls_of(teacher, slots) as calls, autocast(teacher.device, precision):
        for batch in batches:
            batch = batch.to(teacher.device)
            teacher.features(batch.inputs, cu_seqlens=batch.cu_seqlens)
            for slot, (x, _, y) in calls.items():
                squares[slot] += (y - x).double().square().sum().item()
            numbers += batch.inputs.numel() * teacher.design.dim
    if not numbers:
        raise ValueError("alignment: there is no text to measure the teacher's layers on")
    return {slot: max(square / numbers, torch.finfo(torch.float32).tiny) for slot, square in squares.items()}


class Alignment(Objective):
    """Squared error of what each replaced slot adds to the teacher's stream, as a share of `powers`: 1 is as far off as
    adding nothing. The loss is the mean over the slots, and each one's own is a part of it, by the address in the student.

    Only the replaced slots are run, so give all other weights the rate 0. Every position counts, with or without a target.
    """

    def __init__(self, model: LanguageModel, teacher: LanguageModel, powers: Mapping[int, float]):
        super().__init__(model)
        self.teacher, self.powers = teacher.eval().requires_grad_(False), dict(powers)

    def train(self, mode: bool = True) -> "Alignment":
        super().train(mode)
        self.teacher.eval()
        return self

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.inputs.shape[:2].numel())

    def forward(self, batch: Batch, channels: Channels | None = None) -> Loss:
        with torch.no_grad(), calls_of(self.teacher, list(self.powers)) as calls:
            self.teacher.features(batch.inputs, cu_seqlens=batch.cu_seqlens)
        sent, parts, own = Channels(), dict[str, Tensor](), list[Tensor]()
        for slot, (x, context, theirs) in calls.items():
            ours, _ = self.model.run(x, context, slots=[slot], channels=sent)
            error = loss_of(ours, SquaredError(theirs)).total / (self.powers[slot] * len(calls))
            own.append(error)
            parts[self.model.design.slots[slot].address] = error.detach()
        loss = Loss(torch.stack(own).sum(), self.count(batch).to(own[0].device), parts).plus(sent.losses_by_name())
        if channels is not None:
            channels.join(sent)
        return loss
