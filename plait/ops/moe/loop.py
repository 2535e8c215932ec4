"""Experts one after the other on tokens sorted by expert: what each makes of its own stays in the processor's cache, and the
host knows how many there are. An operator, so that a compiled graph holds none of these numbers."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.linalg import vecdot

from plait.ops.graph import gradient, one_step
from plait.ops.moe.activation import activated, pulled
from plait.ops.moe.sorted import by_expert
from plait.ops.operator import operator
from plait.ops.products import linear, multiply


def run(x: Tensor, up: Tensor, down: Tensor, index: Tensor, weights: Tensor, gated: bool) -> Tensor:
    """Shapes as in `experts`, batch and time as one."""
    return _loop(x, up, down, weights, *by_expert(index, len(up)), gated)


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, down, weights, order, ends, gated):
        y, hidden = _forward(x, up, down, weights, order, ends, gated)
        ctx.gated = gated
        ctx.save_for_backward(x, up, down, weights, order, ends, hidden)
        return y

    @staticmethod
    @gradient
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_backward(dy, *ctx.saved_tensors, ctx.gated), None, None, None


_loop = one_step(_Loop)


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, end in enumerate(ends.tolist()):
        yield expert, slice(start, end)
        start = end


@operator("experts")
def _forward(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, order: Tensor, ends: Tensor, gated: bool
) -> tuple[Tensor, Tensor]:
    """Outputs (n, o), and what is inside of the experts (n k, 2h), or h without gates, sorted."""
    token, w = order // weights.shape[1], weights.flatten()[order][:, None]
    hidden, y = x.new_empty(len(order), up.shape[1]), x.new_zeros(len(x), down.shape[1])
    for e, group in _groups(ends):
        multiply(x.index_select(0, token[group]), up[e], hidden[group])
        y.index_add_(0, token[group], linear(activated(hidden[group], gated).mul_(w[group]), down[e]))
    return y, hidden


@torch.library.register_fake("plait::experts")
def _(x, up, down, weights, order, ends, gated):
    return x.new_empty(x.shape[0], down.shape[1]), x.new_empty(order.shape[0], up.shape[1])


@operator("experts_backward")
def _backward(
    dy: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    ends: Tensor,
    hidden: Tensor,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients at x, up, down and weights."""
    token, w = order // weights.shape[1], weights.flatten()[order][:, None]
    dx, dup, ddown = x.new_zeros(x.shape), up.new_empty(up.shape), down.new_empty(down.shape)
    dw = weights.new_empty(len(order))
    for e, group in _groups(ends):
        (a, pull), dz = pulled(hidden[group], gated), dy.index_select(0, token[group])
        da = dz @ down[e]  # of what is w a
        dw[order[group]] = vecdot(da, a)
        torch.mm(dz.mT, a.mul_(w[group]), out=ddown[e])
        dhidden = pull(da.mul_(w[group]))
        torch.mm(dhidden.mT, x.index_select(0, token[group]), out=dup[e])
        dx.index_add_(0, token[group], dhidden @ up[e])
    return dx, dup, ddown, dw.view_as(weights)


@torch.library.register_fake("plait::experts_backward")
def _(dy, x, up, down, weights, order, ends, hidden, gated):
    return (
        x.new_empty(x.shape),
        up.new_empty(up.shape),
        down.new_empty(down.shape),
        weights.new_empty(weights.shape),
    )
