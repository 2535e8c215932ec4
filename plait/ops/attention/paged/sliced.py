"""Attention over pages where the host may read lengths for nothing: no more keys than the longest row has."""

import torch
from torch import Tensor

from plait.ops.attention.paged.gathered import attend, pages, visible


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Shapes as in `paged_attention`."""
    (b, t), page = q.shape[:2], k.shape[1]
    ends = [max(t, length) for length in lengths.tolist()]
    low, high = 0 if window is None else max(0, min(ends) - t - window + 1), max(ends)
    if table is None:
        keys, values = k[:b, low:high], v[:b, low:high]
    else:
        table, before = table[:, low // page : -(-high // page)], low % page
        keys, values = (pages(x, table)[:, before : before + high - low] for x in (k, v))
    if t == 1 and min(ends) == high:  # all see all of it
        return attend(q, keys, values, None, scale, softcap, sinks)
    mask = visible(lengths, t, torch.arange(low, high, device=q.device), window)
    return attend(q, keys, values, mask, scale, softcap, sinks)
