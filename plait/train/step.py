"""Loss and gradients of one optimizer step, in as many parts as memory asks for."""

from typing import Any

import torch
from torch import Tensor

from plait.layers import Channels
from plait.model import Objective


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


def backward(
    objective: Objective,
    batch: Any,
    parts: int,
    precision: str,
    *,
    scored: int | None = None,
    channels: Channels | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradients of the mean loss over all that counts in `batch`; gives that loss, and by name what it
    is made of where that is more than one.

    scored: how many positions count, where this batch is a rank's share of one; else those of the batch.
    channels: gets the stats of the layers, over all parts.
    """
    device = objective.model.device
    scored = max(1, int(objective.count(batch)) if scored is None else scored)
    mean, means = torch.zeros((), device=device), dict[str, Tensor]()
    for part in split(batch, parts):
        sent = Channels()
        with autocast(device, precision):
            loss = objective(part.to(device), channels=sent)
        (loss.total / scored).backward()
        mean += loss.total.detach() / scored
        for name, total in loss.parts.items() if len(loss.parts) > 1 else ():
            means[name] = means[name] + total / scored if name in means else total / scored
        if channels is not None:
            sent.losses.clear()
            channels.join(sent)
    return mean, means
