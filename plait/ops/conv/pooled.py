"""The convolution at a single token on the rows of a pool, in place: the kernel as torch sees it."""

from typing import NamedTuple

import torch
from torch import Tensor

from plait.ops.frame import Rows
from plait.ops.kernels import Call
from plait.ops.operator import operator
from plait.ops.token import DTYPES, on_gpu


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
    x: Tensor, weight: Tensor, bias: Tensor | None, *, state: Tensor, rows: Rows, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """Shapes as in `causal_conv` with t = 1."""
    place, index = (state[rows], None) if isinstance(rows, slice) else (state, rows)
    return _step(x, weight, bias, place, index, silu), state


class Held(NamedTuple):
    """A pool's tensor: its dtype, and whether it is as long as the filter looks back, with channels side by side."""

    dtype: torch.dtype
    fits: bool


def sizes_of(state: Tensor | None, weight: Tensor) -> Held | None:
    if state is None:
        return None
    return Held(state.dtype, state.shape[1] == weight.shape[1] - 1 > 0 and state.stride(2) == 1)


def supports(call: Call) -> str | None:
    reason, tail = on_gpu(call), call.sizes
    if reason is not None or tail is None:
        return reason
    if tail.dtype not in DTYPES:
        return f"no kernel for a tail of {tail.dtype}"
    return None if tail.fits else "the tail is not what the filter looks back at, in one piece"
