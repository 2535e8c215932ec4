"""The selective scan, one token after the other: the definition."""

from functools import partial

import torch
from torch import Tensor

from plait.ops.packing import Packing, each_document


def run(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:
    """Shapes as in `selective_scan`."""
    if packing is not None:
        return each_document(partial(_loop, A), (x, dt, B, C), state, packing)
    y, h, states = _all(A, x, dt, B, C, state)
    return (y, h) if at is None else (y, h, torch.stack(states, 1)[:, at])


def _loop(A: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return _all(A, x, dt, B, C, state)[:2]


def _all(
    A: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Outputs, the last state where one was given, and the state after every token (b, d, k)."""
    h = x.new_zeros(x.shape[0], *A.shape) if state is None else state
    outputs, states = [], []
    for i in range(x.shape[1]):
        a = (dt[:, i, :, None] * A).exp()
        h = torch.baddbmm(a * h, (dt[:, i] * x[:, i])[..., None], B[:, i, None])
        outputs.append(torch.bmm(h, C[:, i, :, None])[..., 0])
        states.append(h)
    return torch.stack(outputs, 1), None if state is None else h, states
