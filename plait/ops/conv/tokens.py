"""The convolution over many tokens on a GPU: the kernels of `tokens_triton` as torch operators, SiLU included."""

import torch
from torch import Tensor

from plait.ops.graph import gradient, one_step
from plait.ops.kernels import Call, needs_tokens
from plait.ops.operator import evenly, operator
from plait.ops.packing import Packing
from plait.ops.token import DTYPES

WIDEST = 8  # taps


def fits(call: Call) -> str | None:
    """None, or why the kernels do not fit."""
    if reason := needs_tokens(call):
        return reason
    if call.dtype not in DTYPES:
        return f"no kernel for {call.dtype}"
    if isinstance(call.sizes, int) and call.sizes > WIDEST or call.at:
        return f"filters of {call.sizes} are above {WIDEST}" if not call.at else "gives no states after chosen tokens"
    return None


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, skip: int | None, packing: Packing | None, silu: bool = False
) -> Tensor:
    """Shapes as in `reference.run`; silu: of what comes out."""
    y = _filtered(x, weight, bias, None if packing is None else packing.offsets, silu)
    return y[:, skip:] if skip else y


class _Filtered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor | None, silu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias, offsets)
        ctx.silu = silu
        return _forward(x, weight, bias, offsets, silu)

    @staticmethod
    @gradient
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, offsets = ctx.saved_tensors
        dx, sums = _backward(x, weight, bias, offsets, dy, ctx.silu)
        dbias = None if bias is None else sums[-1].to(bias.dtype)
        return dx, sums[:-1].T.to(weight.dtype), dbias, None, None


_filtered = one_step(_Filtered)


@operator("conv_tokens", cheap=True, strided=True)
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor | None, silu: bool) -> Tensor:
    from plait.ops.conv import tokens_triton

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens_triton.run_forth(evenly(x), weight, bias, offsets, y, silu)
    return y


@torch.library.register_fake("plait::conv_tokens")
def _(x, weight, bias, offsets, silu):
    return x.new_empty(x.shape)


@operator("conv_tokens_backward", strided=True)
def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor | None, dy: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """The gradient at x, and those at the taps and the bias side by side, (w + 1, d) in float32."""
    from plait.ops.conv import tokens_triton

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = tokens_triton.run_back(evenly(x), weight, bias, offsets, evenly(dy), dx, silu)
    return dx, sums


@torch.library.register_fake("plait::conv_tokens_backward")
def _(x, weight, bias, offsets, dy, silu):
    return x.new_empty(x.shape), x.new_empty(weight.shape[1] + 1, x.shape[2], dtype=torch.float32)
