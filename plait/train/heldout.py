"""How well a model predicts text that it was not trained on."""

import math
from dataclasses import dataclass, field

import torch

from plait.data import Loader, Shards
from plait.model import LanguageModel, token_loss
from plait.train.solver import Fared, Stats, read, together
from plait.train.step import autocast


@dataclass(frozen=True, slots=True)
class HeldOut:
    """loss: nats per token; tokens: how many were predicted; bytes: of text that they stand for; layers: how the solver of
    each recurrent layer fared, by address."""

    loss: float
    tokens: int
    bytes: int
    layers: dict[str, Fared] = field(default_factory=dict)

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / max(1, self.bytes)


@torch.no_grad()
def heldout_loss(
    model: LanguageModel, shards: Shards, *, batch: int, length: int, tokens: int, precision: str = "float32"
) -> HeldOut:
    """Mean loss over the first `tokens` tokens of the held-out documents, rounded up to whole batches."""
    total, scored, text, layers = 0.0, 0, 0, {}
    loader = Loader(shards, "heldout", batch=batch, length=length, order="sequential", epochs=1)
    training = model.training
    model.eval()
    for number, part in enumerate(loader):
        if number * batch * length >= tokens:
            break
        part = part.to(model.device)
        stats: Stats = {}
        with autocast(model.device, precision):
            nll, count = token_loss(model, part.inputs, part.targets, cu_seqlens=part.cu_seqlens, stats=stats)
        total, scored, text = total + nll.item(), scored + int(count), text + part.bytes
        layers = together(layers, read(stats))
    model.train(training)
    return HeldOut(total / max(1, scored), scored, text, layers)
