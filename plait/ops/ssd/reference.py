"""The scalar-decay recurrence, one token after the other: the definition."""

import torch
from torch import Tensor

from plait.ops.packing import Packing, each_document


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:
    """Shapes as in `ssd`."""
    if packing is not None:
        return each_document(_loop, (q, k, v, g), state, packing)
    o, S, states = _all(q, k, v, g, state)
    return (o, S) if at is None else (o, S, torch.stack(states, 1)[:, at])


def _loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return _all(q, k, v, g, state)[:2]


def _all(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Outputs, the last state where one was given, and the state after every token (b, h, v, k)."""
    b, t, h, dv = v.shape
    S = v.new_zeros(b * h, dv, k.shape[-1]) if state is None else state.flatten(0, 1)  # (b h, v, k)
    q, k = (x.repeat_interleave(h // x.shape[2], 2).transpose(1, 2).flatten(0, 1) for x in (q, k))
    v = v.transpose(1, 2).flatten(0, 1)  # (b h, t, v)
    a = g.exp().transpose(1, 2).flatten(0, 1)[..., None, None]  # (b h, t, 1, 1)
    outputs, states = [], []
    for i in range(t):
        S = torch.baddbmm(a[:, i] * S, v[:, i, :, None], k[:, i, None, :])
        outputs.append(S @ q[:, i, :, None])
        states.append(S.unflatten(0, (b, h)))
    o = torch.stack(outputs, 1).squeeze(-1)  # (b h, t, v)
    o = o.unflatten(0, (b, h)).transpose(1, 2)
    return o, None if state is None else states[-1], states
