"""The elementwise recurrence on a GPU: the kernels of `plait.ops.scan.triton`, in float32."""

from functools import partial

import torch
from torch import Tensor

from plait.ops.kernels import Call, needs_tokens
from plait.ops.operator import operator
from plait.ops.scan import chunked


def fits(call: Call) -> str | None:
    """None, or why the kernels do not fit."""
    if reason := needs_tokens(call):
        return reason
    return "computes in float32, the inputs are float64" if call.dtype == torch.float64 else None


@operator("scan_tiles")
def _forward(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    from plait.ops.scan import triton

    return triton.forward(a, b, s)


@torch.library.register_fake("plait::scan_tiles")
def _(a, b, s):
    return b.new_empty(b.shape)


@operator("scan_tiles_backward")
def _backward(dy: Tensor, a: Tensor, states: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    from plait.ops.scan import triton

    return triton.backward(dy, a, states, s)


@torch.library.register_fake("plait::scan_tiles_backward")
def _(dy, a, states, s):
    return a.new_empty(a.shape), dy.new_empty(dy.shape)


run = partial(chunked.run, scan=chunked.differentiable(_forward, _backward))
