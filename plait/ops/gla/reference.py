"""The recurrence with a decay per key channel, one token after the other: the definition."""

import torch
from torch import Tensor

from plait.ops.packing import Packing, each_document


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    p: Tensor | None = None,
    z: Tensor | None = None,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:
    """Shapes as in `gla` and `dplr`."""
    tensors = [x for x in (q, k, v, g, p, z) if x is not None]
    if packing is not None:
        return each_document(lambda *x, state: _all(*x, state=state)[:2], tensors, state, packing)
    o, S, states = _all(*tensors, state=state)
    return (o, S) if at is None else (o, S, torch.stack(states, 1)[:, at])


def _all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    p: Tensor | None = None,
    z: Tensor | None = None,
    *,
    state: Tensor | None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Outputs, the last state where one was given, and the state after every token (b, h, v, k)."""
    b, t, h, dv = v.shape
    S = v.new_zeros(b, h, dv, k.shape[-1]) if state is None else state
    a = g.exp()
    outputs, states = [], []
    for i in range(t):
        value, key = v[:, i, :, :, None], k[:, i, :, None]
        removed = None if p is None else S @ p[:, i, :, :, None]  # (b, h, v, 1)
        S = S * a[:, i, :, None]
        if removed is not None and z is None:
            value = value + removed
        elif removed is not None and z is not None:
            S = S + removed @ z[:, i, :, None]
        S = S + value @ key
        outputs.append((S @ q[:, i, :, :, None]).squeeze(-1))
        states.append(S)
    return torch.stack(outputs, 1), None if state is None else S, states
