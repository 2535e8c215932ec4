"""The scalar-decay recurrence for a single token on the rows of a pool, in place: the kernel as torch sees it."""

import torch
from torch import Tensor

from plait.ops.frame import Rows
from plait.ops.operator import operator


@operator("ssd_step", mutates=("state",))
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    rows: Tensor | None,
    scale: float,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    D: Tensor | None,
    dt_min: float,
    dt_max: float | None,
) -> Tensor:
    from plait.ops.ssd import triton

    out = v.new_empty(v.shape)
    triton.run(q, k, v, g, state, rows, out, scale, A_log, dt_bias, D, dt_min, dt_max)
    return out


@torch.library.register_fake("plait::ssd_step")
def _(q, k, v, g, state, rows, scale, A_log, dt_bias, D, dt_min, dt_max):
    return v.new_empty(v.shape)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    state: Tensor,
    rows: Rows,
    scale: float | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `ssd` with t = 1."""
    place, index = (state[rows], None) if isinstance(rows, slice) else (state, rows)
    scale = 1.0 if scale is None else scale
    o = _step(q, k, v, g, place, index, scale, A_log, dt_bias, D, dt_min, dt_max)
    return o, state
