"""Attention through torch's fused kernels; windows, and logits that are soft-capped or have sinks, go block by block of
queries, so that memory for a window grows linearly in time.
On a GPU windows, and tokens with a past, need no blocks (`flash`)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.attention import flash, halves
from plait.ops.attention.fused import of_one_size, with_lined_gradient
from plait.ops.attention.reference import keys_at, positions, visible, weigh

BLOCK = 256  # queries in a block when there is no window to give the size


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    q_start: int | Tensor,
    k_start: int | Tensor,
    window: int | None,
    prefix: int,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Shapes as in `attention`."""
    t, s = q.shape[1], k.shape[1]
    plain = softcap is None and sinks is None
    if isinstance(q_start, Tensor) or isinstance(k_start, Tensor):
        k_at = keys_at(k_start, s, prefix, q.device)
        mask = visible(positions(q_start, t, q.device), k_at, window, prefix)
        return _fused(q, k, v, mask, scale) if plain else weigh(q, k, v, sinks, mask, softcap, scale)
    prefix = min(prefix, s)
    gap = q_start - k_start + prefix  # query i stands where key i + gap does
    if window is None and plain and k_start >= 0:
        if k.shape[1] > gap + t:
            k, v = k[:, : gap + t], v[:, : gap + t]
        if t == 1:
            return _fused(q, k, v, None, scale)
        if gap == 0:
            return _fused(q, k, v, None, scale, causal=True)
    if plain and not prefix and flash.fits(q, k, v):
        unborn = max(0, -k_start)  # keys before the first position, which nobody sees
        return flash.run(q, k[:, unborn:], v[:, unborn:], gap - unborn, window, scale)
    blocks = []
    for first in range(0, t, window or BLOCK):
        last = min(t, first + (window or BLOCK))
        low = max(prefix, 2 * prefix - k_start, first + gap - window + 1 if window else 0)
        high = max(low, last + gap)
        queries, keys, values = q[:, first:last], _cut(k, prefix, low, high), _cut(v, prefix, low, high)
        k_at = keys_at(k_start + low - prefix, keys.shape[1], prefix, q.device)
        mask = visible(positions(q_start + first, last - first, q.device), k_at, window, prefix)
        everything = t == 1 and q_start >= prefix
        blocks.append(
            _fused(queries, keys, values, None if everything else mask, scale)
            if plain
            else weigh(queries, keys, values, sinks, mask, softcap, scale)
        )
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _cut(x: Tensor, prefix: int, low: int, high: int) -> Tensor:
    """Keys from `low` to `high`, behind the first `prefix`."""
    if not prefix:
        return x[:, low:high]
    return x[:, :high] if low == prefix else torch.cat([x[:, :prefix], x[:, low:high]], 1)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    b, t, h, dk = q.shape
    if t == 1:  # the heads that share a key head are as good as queries of it, and its keys are read once for all
        o = F.scaled_dot_product_attention(
            q.reshape(b, k.shape[2], -1, dk), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
        )
        return with_lined_gradient(o).reshape(b, 1, h, v.shape[3])
    size, (q, k, v) = v.shape[3], of_one_size(q, k, v)
    if causal and (pieces := halves.pieces(q)) > 1:
        return halves.run(q, k, v, scale, pieces)[..., :size]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    return with_lined_gradient(o).transpose(1, 2)[..., :size]
