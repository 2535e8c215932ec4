"""Attention over pages in torch alone, a function of device tensors: the pages that may be visible, and a mask."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from plait.ops.attention.fused import for_any_length
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
    first = None
    if table is None:
        keys, values = k[:b], v[:b]
    else:
        if window is not None and (count := touched(window + t - 1, page)) < table.shape[1]:
            index = ((lengths - t - window + 1).clamp(min=0) // page)[:, None] + torch.arange(count, device=q.device)
            table, first = table.gather(1, index.clamp(max=table.shape[1] - 1)), index[:, :1] * page
        keys, values = pages(k, table), pages(v, table)
    at = torch.arange(keys.shape[1], device=q.device)
    seen = visible(lengths, t, at if first is None else first + at, window)
    return attend(q, keys, values, added(seen, q.dtype), scale, softcap, sinks)


def visible(lengths: Tensor, t: int, at: Tensor, window: int | None) -> Bool[Tensor, "b one t s"]:
    """Which keys, at the positions `at` (s or b s), each row's last t tokens see."""
    ends = lengths.clamp(min=t)[:, None]
    if t > 1:
        ends = ends - torch.arange(t - 1, -1, -1, device=lengths.device)
    at, ends = at if at.ndim == 1 else at[:, None], ends[..., None]  # (s) or (b, 1, s), (b, t, 1)
    seen = at < ends
    return (seen if window is None else seen & (at >= ends - window))[:, None]


def added(seen: Bool[Tensor, "b one t s"], dtype: torch.dtype) -> Float[Tensor, "b one t s"]:
    """What is added to logits: 0 where a key is seen, else -inf."""
    return torch.where(seen, torch.zeros((), dtype=dtype, device=seen.device), -torch.inf)


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
    mask: Float[Tensor, "b one t s"] | None,
    scale: float,
    softcap: float | None,
    sinks: Float[Tensor, " h"] | None,
) -> Float[Tensor, "b t h v"]:
    """The heads that share a key head are as good as queries of it, and its keys are read once for all."""
    (b, t, h, _), g = q.shape, keys.shape[2]
    rows = q.reshape(b, t, g, h // g, -1)
    rows = rows[:, 0] if t == 1 else rows.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (b, g, h/g t, k)
    keys, values = cast(keys, q.dtype).transpose(1, 2), cast(values, q.dtype).transpose(1, 2)
    if mask is not None and t > 1:
        mask = mask.repeat(1, 1, h // g, 1)
    if softcap is not None or sinks is not None:
        o = _weigh(rows, keys, values, mask, scale, softcap, sinks)
    elif q.device.type == "cuda":
        o = for_any_length(_fused, rows, keys, values, mask, scale)
    else:
        o = _fused(rows, keys, values, mask, scale)
    return o.reshape(b, 1, h, -1) if t == 1 else o.unflatten(2, (-1, t)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _weigh(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    logits = wide(q) @ wide(k).mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits + mask
    if sinks is not None:  # one more key, whose value is nothing
        sink = wide(sinks).view(1, k.shape[1], -1, 1).repeat_interleave(q.shape[2] * k.shape[1] // len(sinks), 2)
        logits = torch.cat([logits, sink.expand(len(q), -1, -1, -1)], 3)
    return cast(logits.softmax(-1)[..., : k.shape[2]] @ wide(v), q.dtype)
