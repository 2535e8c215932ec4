"""Loss and gradients of one optimizer step, in as many parts as memory asks for."""

from typing import Any

import torch
from torch import Tensor

from plait.model import Objective
from plait.train.solver import Stats, worst


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 matrix multiplications where the run asks for them; weights and what accumulates stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def split(batch: Any, parts: int) -> list[Any]:
    """`batch` in about equal parts, cut between rows, or between documents' pieces where those are packed: together they
    compute what the whole does."""
    if parts == 1:
        return [batch]
    if batch.cu_seqlens is None:
        edges = sorted({round(len(batch.inputs) * part / parts) for part in range(parts + 1)})
        return [batch.part(start, end) for start, end in zip(edges, edges[1:], strict=False)]
    cuts = batch.cu_seqlens.tolist()
    edges = sorted({min(cuts, key=lambda cut: abs(cut - cuts[-1] * part / parts)) for part in range(parts + 1)})
    return [batch.part(start, end) for start, end in zip(edges, edges[1:], strict=False)]


def backward(objective: Objective, batch: Any, parts: int, precision: str, stats: Stats | None = None) -> Tensor:
    """The gradients of the mean loss over all that counts in `batch`, for parameters that have none; returns that loss.

    How many positions count, the objective says when it has been run. Until then all targets are taken to.
    stats: an empty dict that gets what the layers leave, over all parts the worst.
    """
    device, expected = objective.model.device, max(1, scored(batch.targets))
    mean, count = torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device)
    for part in split(batch, parts):
        own: Stats = {}
        with autocast(device, precision):
            loss = objective(part.to(device), stats=own)
        (loss.total / expected).backward()
        if stats is not None:
            worst(stats, own)
        mean += loss.total.detach() / expected
        count += loss.count
    if (counted := max(1, int(count))) == expected:
        return mean
    gradients = [p.grad for p in objective.model.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, expected / counted)
    return mean * (expected / counted)


def scored(targets: Tensor) -> int:
    """Positions that have a target: ids not below 0, or all vectors."""
    return targets.shape[:-1].numel() if targets.is_floating_point() else int((targets >= 0).sum())
