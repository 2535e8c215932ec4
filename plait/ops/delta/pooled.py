"""The gated delta rule for a single token on the rows of a pool, in place: the kernel as torch sees it."""

import torch
from torch import Tensor

from plait.ops.frame import Rows
from plait.ops.operator import operator


@operator("delta_step", mutates=("state",))
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    rows: Tensor | None,
    scale: float,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    eps: float | None,
    most: float,
) -> Tensor:
    from plait.ops.delta import triton

    out = v.new_empty(v.shape)
    triton.run(q, k, v, g, beta, state, rows, out, scale, A_log, dt_bias, eps, most)
    return out


@torch.library.register_fake("plait::delta_step")
def _(q, k, v, g, beta, state, rows, scale, A_log, dt_bias, eps, most):
    return v.new_empty(v.shape)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor,
    rows: Rows,
    scale: float | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    eps: float | None = None,
    most: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `gated_delta` with t = 1."""
    place, index = (state[rows], None) if isinstance(rows, slice) else (state, rows)
    o = _step(q, k, v, g, beta, place, index, 1.0 if scale is None else scale, A_log, dt_bias, eps, most)
    return o, state
