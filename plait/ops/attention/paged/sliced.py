"""Attention over pages where the host may read lengths for nothing: no more keys than the longest row has."""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from plait.ops.attention.paged.gathered import added, attend, pages, visible


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
    return attend(q, keys, values, _mask(tuple(ends), t, low, high, window, q.dtype), scale, softcap, sinks)


@lru_cache(maxsize=8)  # the layers of a step ask for the same one after the other
def _mask(
    ends: tuple[int, ...], t: int, low: int, high: int, window: int | None, dtype: torch.dtype
) -> Float[Tensor, "b one t s"]:
    """Which of the keys `low` to `high` each row's last t tokens see."""
    with torch.inference_mode(False), torch.device("cpu"):  # a call with gradients may be the next to use it
        return added(visible(torch.tensor(ends), t, torch.arange(low, high), window), dtype)
