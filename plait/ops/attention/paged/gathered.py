"""Attention over pages in torch alone, a function of device tensors: the pages that may be visible, and a mask."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from plait.ops.attention.fused import for_any_length
from plait.ops.attention.reference import positions, visible
from plait.ops.kernels import cast, wide


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
    """Shapes as in `paged_attention`. All keys of the table, or of the pages that a window can touch, are read."""
    (b, t), page = q.shape[:2], k.shape[1]
    start = (lengths - t).clamp(min=0)
    if table is None:
        keys, values, first = k[:b], v[:b], 0
    else:
        first = 0
        if window is not None and (count := touched(window + t - 1, page)) < table.shape[1]:
            index = ((start - window + 1).clamp(min=0) // page)[:, None] + torch.arange(count, device=q.device)
            table, first = table.gather(1, index.clamp(max=table.shape[1] - 1)), index[:, 0] * page
        keys, values = pages(k, table), pages(v, table)
    mask = visible(positions(start, t, q.device), positions(first, keys.shape[1], q.device), window)
    return attend(q, keys, values, mask, scale, softcap, sinks)


def touched(tokens: int, page: int) -> int:
    """How many pages so many tokens in a row can lie on."""
    return 1 + -(-(tokens - 1) // page)


def pages(x: Float[Tensor, "pages page g k"], table: Tensor) -> Float[Tensor, "b s g k"]:
    """A row's pages one after the other."""
    return x.index_select(0, table.flatten()).view(len(table), -1, *x.shape[2:])


def attend(
    q: Float[Tensor, "b t h k"],
    keys: Float[Tensor, "b s g k"],
    values: Float[Tensor, "b s g v"],
    mask: Bool[Tensor, "b one t s"] | None,
    scale: float,
    softcap: float | None,
    sinks: Float[Tensor, " h"] | None,
) -> Float[Tensor, "b t h v"]:
    """The heads that share a key head are as good as queries of it, and its keys are read once for all."""
    t, g = q.shape[1], keys.shape[2]
    rows = q.unflatten(2, (g, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (b, g, h/g t, k)
    keys, values = (cast(x, q.dtype).transpose(1, 2) for x in (keys, values))
    if mask is not None and t > 1:
        mask = mask.repeat(1, 1, rows.shape[2] // t, 1)
    if softcap is None and sinks is None:
        o = for_any_length(_fused, rows, keys, values, mask, scale)
    else:
        o = _weigh(rows, keys, values, mask, scale, softcap, sinks)
    return o.unflatten(2, (-1, t)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _weigh(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    logits = wide(q) @ wide(k).mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:  # one more key, whose value is nothing
        sink = wide(sinks).view(1, k.shape[1], -1, 1).repeat_interleave(q.shape[2] * k.shape[1] // len(sinks), 2)
        logits = torch.cat([logits, sink.expand(len(q), -1, -1, -1)], 3)
    return cast(logits.softmax(-1)[..., : k.shape[2]] @ wide(v), q.dtype)
