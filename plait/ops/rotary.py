"""Turning channel pairs (i, i + r/2) of the first r channels by given angles (arXiv 2104.09864, eq. 34)."""

import torch
from jaxtyping import Float
from torch import Tensor

from plait.ops.graph import gradient
from plait.ops.operator import operator
from plait.ops.token import few_rows


def rotate(
    x: Float[Tensor, "b t h k"], cos: Float[Tensor, "b t 1 1 r/2"], sin: Float[Tensor, "b t 1 2 r/2"]
) -> Float[Tensor, "b t h k"]:
    """`sin` has the sign of either member of a pair."""
    rotated = 2 * cos.shape[-1]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Rotate.apply(x, cos, sin)
    if few_rows(x) and cos.shape[:2] == x.shape[:2] and cos.is_contiguous() and sin.is_contiguous():
        return _rows(x, cos, sin)
    head = x if rotated == x.shape[-1] else x[..., :rotated]
    pairs = head.view(*x.shape[:3], 2, -1)  # (b, t, h, 2, r/2): first and second of each pair
    turned = torch.addcmul(pairs * cos, pairs.flip(-2), sin).flatten(-2)
    return turned if head is x else torch.cat([turned, x[..., rotated:]], -1)


class _Rotate(torch.autograd.Function):
    """Writes every channel where it is to lie, and its gradient too, which is turned back; autograd keeps swapped copies."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.unbind(-2)
        return _turned(x, cos.squeeze(-2), first, second)

    @staticmethod
    @gradient
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        first, second = sin.unbind(-2)
        return _turned(dy, cos.squeeze(-2), second, first), None, None


def _turned(
    x: Float[Tensor, "b t h k"], cos: Float[Tensor, "b t 1 r/2"], first: Tensor, second: Tensor
) -> Float[Tensor, "b t h k"]:
    """Members of pairs times `cos`, plus the other member times `first` for the first one and `second` for the second."""
    half, y = cos.shape[-1], x.new_empty(x.shape)
    widths = half, half, x.shape[-1] - 2 * half
    (a, b, rest), (turned_a, turned_b, unturned) = (z.split_with_sizes(widths, -1) for z in (x, y))
    torch.mul(a, cos, out=turned_a).addcmul_(b, first)
    torch.mul(b, cos, out=turned_b).addcmul_(a, second)
    unturned.copy_(rest)
    return y


@operator("rotate", cheap=True)
def _rows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from plait.ops import elementwise_triton

    out = x.new_empty(x.shape)
    elementwise_triton.rotate(x, cos, sin, out)
    return out


@torch.library.register_fake("plait::rotate")
def _(x, cos, sin):
    return x.new_empty(x.shape)
