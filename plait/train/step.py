"""Loss and gradients of one optimizer step, in as many parts as memory asks for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plait.layers import Channels
from plait.model import LanguageModel, Objective


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 matrix multiplications where the run asks for them; weights and what accumulates stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def compile_slots(*models: LanguageModel) -> None:
    """Equal slots share their graphs, in training and in evaluation; all are kept in one place, which is made for a single
    function: without more room the slots that come last would run as they are."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * sum(len(model.slots) for model in models))
    for model in models:
        for slot in model.slots:
            slot.compile()


def models_of(objective: Objective) -> list[LanguageModel]:
    """The model that is trained, and those that it is held against."""
    return [module for module in objective.modules() if isinstance(module, LanguageModel)]


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
    parts: int | Sequence[Any],
    precision: str,
    *,
    scored: int | None = None,
    channels: Channels | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradients of the mean loss over all that counts in `batch`; gives that loss, and by name what it
    is made of where that is more than one.

    parts: how many to cut it into, or those parts on the model's device.
    scored: how many positions count, where this batch is a rank's share of one; else those of the batch.
    channels: gets the stats of the layers, over all parts.
    """
    device = objective.model.device
    own = int(objective.count(batch))
    scored = max(1, own if scored is None else scored)
    mean, means = torch.zeros((), device=device), dict[str, Tensor]()
    count = torch.zeros((), dtype=torch.long, device=device)
    for part in [each.to(device) for each in split(batch, parts)] if isinstance(parts, int) else parts:
        sent = Channels()
        with autocast(device, precision):
            loss = objective(part, channels=sent)
        (loss.total / scored).backward()
        mean += loss.total.detach() / scored
        count += loss.count
        for name, total in loss.parts.items() if len(loss.parts) > 1 else ():
            means[name] = means[name] + total / scored if name in means else total / scored
        if channels is not None:
            sent.losses.clear()
            channels.join(sent)
    if not objective.count_holds:  # asked once: it waits for the device
        check_count(objective, int(count), own)
        objective.count_holds = True
    return mean, means


def check_count(objective: Objective, scored: int, expected: int) -> None:
    """Raise ValueError where a step would be the mean over another number of positions than the objective's loss sums over."""
    if scored != expected:
        raise ValueError(
            f"{type(objective).__name__} scored {scored} positions of a batch, but its count(batch) says {expected}: a step is "
            "the mean over what counts, so count must give the positions that the rule scores"
        )
