"""Attention through torch's fused kernels; windows and soft-capped logits go block by block of queries, so that memory
for a window grows linearly in time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.attention.reference import positions, visible, weigh

BLOCK = 256  # queries in a block when there is no window to give the size


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: int | Tensor,
    k_start: int | Tensor,
    window: int | None,
    softcap: float | None,
    scale: float | None,
) -> Tensor:
    """Shapes as in `attention`."""
    t, s = q.shape[1], k.shape[1]
    if isinstance(q_start, Tensor) or isinstance(k_start, Tensor):
        mask = visible(positions(q_start, t, q.device), positions(k_start, s, q.device), window)
        return _fused(q, k, v, mask, scale) if softcap is None else weigh(q, k, v, mask, softcap, scale)
    gap = q_start - k_start  # query i stands where key i + gap does
    if window is None and softcap is None and k_start >= 0:
        if k.shape[1] > gap + t:
            k, v = k[:, : gap + t], v[:, : gap + t]
        if t == 1:
            return _fused(q, k, v, None, scale)
        if gap == 0:
            return _fused(q, k, v, None, scale, causal=True)
    blocks = []
    for first in range(0, t, window or BLOCK):
        last = min(t, first + (window or BLOCK))
        low = max(0, -k_start, first + gap - window + 1 if window else 0)
        high = last + gap
        queries, keys, values = q[:, first:last], k[:, low:high], v[:, low:high]
        mask = visible(
            positions(q_start + first, last - first, q.device), positions(k_start + low, high - low, q.device), window
        )
        blocks.append(
            _fused(queries, keys, values, None if t == 1 else mask, scale)
            if softcap is None
            else weigh(queries, keys, values, mask, softcap, scale)
        )
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool = False) -> Tensor:
    b, t, h, dk = q.shape
    if t == 1:  # the heads that share a key head are as good as queries of it, and its keys are read once for all
        o = F.scaled_dot_product_attention(
            q.reshape(b, k.shape[2], -1, dk), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
        )
        return o.reshape(b, 1, h, v.shape[3])
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    gqa = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    return o.transpose(1, 2)
