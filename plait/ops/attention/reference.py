"""Attention with its mask and softmax written out: the definition."""

import torch
from torch import Tensor

from plait.ops.kernels import wide


def positions(start: int | Tensor, count: int, device: torch.device) -> Tensor:
    """(b or 1, count) positions that begin at `start`."""
    ramp = torch.arange(count, device=device)
    return ramp[None] + (start[:, None] if isinstance(start, Tensor) else start)


def keys_at(start: int | Tensor, count: int, prefix: int, device: torch.device) -> Tensor:
    """(b or 1, count) positions of keys, below 0 for those that nobody sees: the first `prefix` of all, and then those that
    begin at `start`, in which the first ones would come a second time."""
    if not prefix:
        return positions(start, count, device)
    rest = positions(start, max(0, count - prefix), device)
    rest = rest.masked_fill(rest < prefix, -1)
    return torch.cat([positions(0, min(prefix, count), device).expand(len(rest), -1), rest], 1)


def visible(q_at: Tensor, k_at: Tensor, window: int | None, prefix: int = 0) -> Tensor:
    """Which keys each query sees: (b, 1, t, s)."""
    k_at = k_at[:, None, :]
    gap = q_at[:, :, None] - k_at
    seen = (gap >= 0) & (k_at >= 0)
    if window is not None:
        near = gap < window
        seen = seen & (near | (k_at < prefix) if prefix else near)
    return seen[:, None]


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
    k_at = keys_at(k_start, k.shape[1], prefix, q.device)
    mask = visible(positions(q_start, q.shape[1], q.device), k_at, window, prefix)
    return weigh(q, k, v, sinks, mask, softcap, scale)


def weigh(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Tensor, softcap: float | None, scale: float
) -> Tensor:
    """The weighted sum of values for a given mask (b, 1, t, s)."""
    with torch.autocast(q.device.type, enabled=False):
        times = q.shape[2] // k.shape[2]
        queries = wide(q).transpose(1, 2)  # (b, h, t, k)
        keys, values = (wide(x).repeat_interleave(times, 2).transpose(1, 2) for x in (k, v))
        logits = queries @ keys.mT * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~mask, -torch.inf)
        if sinks is not None:  # one more key, whose value is nothing
            sink = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sink], 3)
        return (logits.softmax(-1)[..., : k.shape[1]] @ values).transpose(1, 2).to(v.dtype)
