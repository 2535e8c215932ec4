"""Loss and gradients of one optimizer step, in as many parts as memory asks for."""

import torch
from torch import Tensor

from plait.data import Batch
from plait.model import LanguageModel, token_loss
from plait.train.solver import Stats, worst


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 matrix multiplications where the run asks for them; weights and what accumulates stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def split(batch: Batch, parts: int) -> list[Batch]:
    """`batch` in about equal parts, cut only between documents' pieces: together they compute what the whole does."""
    cuts = batch.cu_seqlens.tolist()
    edges = sorted({min(cuts, key=lambda cut: abs(cut - cuts[-1] * part / parts)) for part in range(parts + 1)})
    pieces = []
    for start, end in zip(edges, edges[1:], strict=False):
        inside = batch.cu_seqlens[cuts.index(start) : cuts.index(end) + 1] - start
        pieces.append(Batch(batch.inputs[:, start:end], batch.targets[:, start:end], inside, 0))
    return pieces


def backward(model: LanguageModel, batch: Batch, parts: int, precision: str, stats: Stats | None = None) -> Tensor:
    """Add the gradients of the mean loss over all scored tokens of `batch`; returns that loss (nats per token).

    stats: an empty dict that gets what the layers leave, over all parts the worst.
    """
    scored = max(1, int((batch.targets >= 0).sum()))
    loss = torch.zeros((), device=model.device)
    for part in split(batch, parts):
        part = part.to(model.device)
        found: Stats = {}
        with autocast(model.device, precision):
            nll, _ = token_loss(model, part.inputs, part.targets, cu_seqlens=part.cu_seqlens, stats=found)
        (nll / scored).backward()
        if stats is not None:
            worst(stats, found)
        loss += nll.detach() / scored
    return loss
