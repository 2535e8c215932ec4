"""The convolution as w shifted multiply-adds over whole rows, forward and backward.

Written with its own gradient: autograd would keep a shifted copy of the input per tap and fill zeros around each.
"""

import torch
from torch import Tensor

from plait.ops.graph import gradient, one_step
from plait.ops.packing import Packing


def run(x: Tensor, weight: Tensor, bias: Tensor | None, skip: int | None, packing: Packing | None) -> Tensor:
    """Shapes as in `reference.run`."""
    offsets = None if packing is None else packing.offsets[..., None]
    y = _shifted_sum(x, weight, bias, offsets)
    return y[:, skip:] if skip else y


class _ShiftedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.has_bias = bias is not None
        taps = weight.to(x.dtype).flip(1).T.contiguous()  # (w, d), the token's own tap first
        y = x * taps[0] if bias is None else torch.addcmul(bias.to(x.dtype), x, taps[0])
        for back in range(1, min(len(taps), x.shape[1])):
            y[:, back:].addcmul_(_earlier(x, back, offsets), taps[back])
        return y

    @staticmethod
    @gradient
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, offsets = ctx.saved_tensors
        taps = weight.to(x.dtype).flip(1).T.contiguous()
        dx, dtaps, learned = dy * taps[0], torch.zeros_like(taps), ctx.needs_input_grad[1]
        product = dy * x if learned else dy  # one buffer for all taps: fresh pages cost more than the arithmetic
        if learned:
            dtaps[0] = product.flatten(0, 1).sum(0)
        for back in range(1, min(len(taps), x.shape[1])):
            late = dy[:, back:] if offsets is None else dy[:, back:] * (offsets[:, back:] >= back)
            dx[:, :-back].addcmul_(late, taps[back])
            if not learned:
                continue
            product[:, back:].copy_(late).mul_(x[:, :-back])
            product[:, :back] = 0  # a sum over whole rows is several times faster than one over a slice
            dtaps[back] = product.flatten(0, 1).sum(0)
        dweight = dtaps.T.flip(1).to(weight.dtype)
        return dx, dweight, dy.flatten(0, 1).sum(0).to(weight.dtype) if ctx.has_bias else None, None


def _earlier(x: Tensor, back: int, offsets: Tensor | None) -> Tensor:
    """What each token from `back` on sees `back` tokens earlier; nothing across a document's start."""
    earlier = x[:, :-back]
    return earlier if offsets is None else earlier * (offsets[:, back:] >= back)


_shifted_sum = one_step(_ShiftedSum)
