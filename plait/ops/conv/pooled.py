"""The convolution at a single token on the rows of a pool, in place: the kernel as torch sees it."""

import torch
from torch import Tensor

from plait.ops.frame import Rows
from plait.ops.operator import operator


@operator("conv_step", mutates=("state",))
def _step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, rows: Tensor | None, silu: bool) -> Tensor:
    from plait.ops.conv import triton

    out = x.new_empty(x.shape)
    triton.run(x, weight, bias, state, rows, out, silu)
    return out


@torch.library.register_fake("plait::conv_step")
def _(x, weight, bias, state, rows, silu):
    return x.new_empty(x.shape)


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, *, state: Tensor, rows: Rows
) -> tuple[Tensor, Tensor]:
    """Shapes as in `causal_conv` with t = 1."""
    place, index = (state[rows], None) if isinstance(rows, slice) else (state, rows)
    return _step(x, weight, bias, place, index, silu), state
