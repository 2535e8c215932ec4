"""Rules that learn something small for every layer."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.convert.measured import places_of
from plait.convert.scores import Request, Scores, divergences, precision, student, timed, with_one
from plait.design import declared
from plait.layers.context import Context
from plait.model.language_model import LanguageModel
from plait.model.objective import Batch, Distillation
from plait.train.step import autocast

GATE_RATE = 0.1
MIXER_RATE, BODY_RATE = 1e-4, 7e-6  # of KL-guided GA-S2 (arXiv 2512.20569), stage 2


def gates(teacher: LanguageModel, request: Request, data: Sequence[Batch]) -> Scores:
    """FlashMorph (arXiv 2606.30562): every layer gives g attention + (1 - g) mixer, all weights are frozen, and the g, which
    sum to as many as stay, are learned by KL to the teacher. The score is g."""
    scores = Scores()
    with timed(scores):
        base = student(teacher, request, data, scores)
    with timed(scores) as out, unchanged(teacher, base):
        shares = Shares(len(places_of(teacher)), request.keep, teacher.device)
        model = _blended(teacher, base, shares)
        optimiser = torch.optim.Adam([shares.logits], lr=request.rate or GATE_RATE)
        _learn(Distillation(model, teacher), optimiser, data, request.steps, out, shares.update)
        shares.update()
        out.scores = dict(zip(places_of(teacher), shares.values.tolist(), strict=True))
    return out


def ga_s2(teacher: LanguageModel, request: Request, data: Sequence[Batch]) -> Scores:
    """KL-guided GA-S2 (arXiv 2512.20569): by how much KL after a short distillation is below the worst layer's, where this
    layer alone stays attention. The last fifth of the data measures; the others train."""
    held = max(1, len(data) // 5)
    with timed(Scores()) as out, unchanged(teacher):
        base, found = student(teacher, request, data, out), {}
        for address, index in places_of(teacher).items():
            model = copy.deepcopy(with_one(base, teacher, index))
            optimiser = torch.optim.AdamW(_groups(model, teacher, request), betas=(0.9, 0.95), weight_decay=0.0)
            _learn(Distillation(model, teacher), optimiser, data[:-held] or data, request.steps, out)
            found[address] = divergences(teacher, {address: model}, data[-held:], out)[address]
        out.scores = {address: max(found.values()) - value for address, value in found.items()}
    return out


class Shares:
    """How much attention each layer gives: `values`, which `update` makes of the logits that are learned, sum to `total`."""

    def __init__(self, layers: int, total: float, device: torch.device):
        self.logits, self.total = torch.zeros(layers, device=device, requires_grad=True), total
        self.update()

    def update(self) -> None:
        self.values = at_budget(self.logits, self.total)


def at_budget(logits: Float[Tensor, " n"], total: float) -> Float[Tensor, " n"]:
    """sigmoid(logits - c), c such that they sum to `total`; gradients know how c moves with the logits."""
    with torch.no_grad():
        low, high = logits.min() - 40, logits.max() + 40
        for _ in range(60):
            c = (low + high) / 2
            more = torch.sigmoid(logits - c).sum() > total
            low, high = torch.where(more, c, low), torch.where(more, high, c)
        slope = torch.sigmoid(logits - c) * torch.sigmoid(c - logits)
    moved = ((logits - logits.detach()) * slope).sum() / slope.sum()  # 0, with the gradient of c
    return torch.sigmoid(logits - c - moved)


class _Blend(nn.Module):
    """g of the old layer and 1 - g of the new one."""

    def __init__(self, old: nn.Module, new: nn.Module, shares: Shares, index: int):
        super().__init__()
        self.old, self.new, self.shares, self.index = old, new, shares, index

    def forward(self, x: Float[Tensor, "b t d"], context: Context, state: None) -> tuple[Float[Tensor, "b t d"], None]:
        g = self.shares.values[self.index].to(x.dtype)
        return g * self.old(x, context, None)[0] + (1 - g) * self.new(x, context, None)[0], None


def _blended(teacher: LanguageModel, base: LanguageModel, shares: Shares) -> LanguageModel:
    """A frozen copy of the teacher in which every attention layer has its replacement beside it."""
    model, there = copy.deepcopy(teacher), base.design.places()
    for i, (address, index) in enumerate(places_of(teacher).items()):
        old = model.place(address)
        blend = _Blend(old, base.place(there[index]), shares, i)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if child is old and parent is not blend:
                    setattr(parent, name, blend)
    return model.requires_grad_(False)


def _groups(model: LanguageModel, teacher: LanguageModel, request: Request) -> list[dict[str, Any]]:
    """Replaced layers and the rest, at their rates; what no gradient moves is left out."""
    places, own = model.design.places(), set[int]()
    for index in places_of(teacher).values():
        own |= {id(p) for p in model.place(places[index]).parameters()}
    parameters = dict(model.named_parameters())
    learned = [parameters[w.name] for w in declared.weights(model.design) if w.role != "balance"]
    for parameter in learned:
        parameter.requires_grad_(True)
    mixer = request.rate or MIXER_RATE
    return [
        {"params": [p for p in learned if id(p) in own], "lr": mixer},
        {"params": [p for p in learned if id(p) not in own], "lr": mixer * BODY_RATE / MIXER_RATE},
    ]


def _learn(
    objective: Distillation,
    optimiser: torch.optim.Optimizer,
    data: Sequence[Batch],
    steps: int,
    out: Scores,
    before: Callable[[], None] = lambda: None,
) -> None:
    for step in range(steps):
        batch = data[step % len(data)]
        before()
        with autocast(objective.model.device, precision(objective.model)):
            loss = objective(batch).mean
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        out.tokens += 2 * batch.inputs.numel()


@contextmanager
def unchanged(*models: LanguageModel) -> Iterator[None]:
    """After it, the models learn what they learned before, in the mode they were in."""
    before = [(p, p.requires_grad) for model in models for p in model.parameters()]
    modes = [(model, model.training) for model in models]
    try:
        yield
    finally:
        for parameter, learned in before:
            parameter.requires_grad_(learned)
        for model, mode in modes:
            model.train(mode)
