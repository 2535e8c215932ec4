"""Attention with its mask and softmax written out: the definition."""

import torch
from torch import Tensor

from plait.ops.kernels import wide


def positions(start: int | Tensor, count: int, device: torch.device) -> Tensor:
    """(b or 1, count) positions that begin at `start`."""
    ramp = torch.arange(count, device=device)
    return ramp[None] + (start[:, None] if isinstance(start, Tensor) else start)


def visible(q_at: Tensor, k_at: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees: (b, 1, t, s)."""
    gap = q_at[:, :, None] - k_at[:, None, :]
    seen = (gap >= 0) & (k_at[:, None, :] >= 0)
    return (seen if window is None else seen & (gap < window))[:, None]


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
    mask = visible(positions(q_start, q.shape[1], q.device), positions(k_start, k.shape[1], q.device), window)
    return weigh(q, k, v, mask, softcap, scale)


def weigh(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None, scale: float | None) -> Tensor:
    """The weighted sum of values for a given mask (b, 1, t, s)."""
    with torch.autocast(q.device.type, enabled=False):
        times = q.shape[2] // k.shape[2]
        queries = wide(q).transpose(1, 2)  # (b, h, t, k)
        keys, values = (wide(x).repeat_interleave(times, 2).transpose(1, 2) for x in (k, v))
        logits = queries @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ values).transpose(1, 2).to(v.dtype)
