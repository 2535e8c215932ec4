"""The gated delta rule, one token after the other: the definition."""

import torch
from torch import Tensor

from plait.ops.packing import Packing, each_document


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:
    """Shapes as in `gated_delta`."""
    if packing is not None:
        return each_document(_loop, (q, k, v, g, beta), state, packing)
    o, S, states = _all(q, k, v, g, beta, state)
    return (o, S) if at is None else (o, S, torch.stack(states, 1)[:, at])


def _loop(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return _all(q, k, v, g, beta, state)[:2]


def _all(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Outputs, the last state where one was given, and the state after every token (b, h, v, k)."""
    b, t, h, dv = v.shape
    S = v.new_zeros(b * h, dv, k.shape[-1]) if state is None else state.flatten(0, 1)  # (b h, v, k)
    q, k = (x.repeat_interleave(h // x.shape[2], 2) for x in (q, k))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (b h, t, k | v)
    a, beta = (x.transpose(1, 2).flatten(0, 1)[..., None, None] for x in (g.exp(), beta))  # (b h, t, 1, 1)
    outputs, states = [], []
    for i in range(t):
        S = a[:, i] * S
        error = v[:, i, :, None] - S @ k[:, i, :, None]  # (b h, v, 1)
        S = torch.baddbmm(S, beta[:, i] * error, k[:, i, None, :])
        outputs.append(S @ q[:, i, :, None])
        states.append(S.unflatten(0, (b, h)))
    o = torch.stack(outputs, 1).squeeze(-1)  # (b h, t, v)
    o = o.unflatten(0, (b, h)).transpose(1, 2)
    return o, None if state is None else states[-1], states
