"""Attention over pages, row by row and key by key: the definition."""

import torch
from torch import Tensor

from plait.ops.kernels import wide


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
    out, (t, heads) = [], q.shape[1:3]
    for row, length in enumerate(lengths.clamp(min=t).tolist()):
        place = torch.arange(length, device=q.device)
        page = place * 0 + row if table is None else table[row, place // k.shape[1]].long()
        keys, values = (
            wide(x[page, place % k.shape[1]]).repeat_interleave(heads // x.shape[2], 1).transpose(0, 1) for x in (k, v)
        )  # (h, length, k)
        logits = wide(q[row]).transpose(0, 1) @ keys.mT * scale  # (h, t, length)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        gap = place[length - t :, None] - place
        seen = gap >= 0 if window is None else (gap >= 0) & (gap < window)
        logits = logits.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, wide(sinks)[:, None, None].expand(-1, t, 1)], 2)
        weights = logits.softmax(-1)[..., :length]
        out.append((weights @ values).transpose(0, 1))
    return torch.stack(out).to(q.dtype)
