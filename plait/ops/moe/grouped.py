"""Experts by torch's matrix product for groups of rows, whose sizes are on the device: nobody waits for them.

What comes out is gathered back and summed in the order of a token's choices; the gradient of gathering is the same sum. So
neither way adds in memory, where the order would be chance.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from plait.ops.graph import gradient, one_step
from plait.ops.moe.activation import activated
from plait.ops.moe.sorted import by_expert


def run(x: Tensor, up: Tensor, down: Tensor, index: Tensor, weights: Tensor, gated: bool) -> Tensor:
    """Shapes as in `experts`, batch and time as one."""
    order, ends = by_expert(index, len(up))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))  # of each choice
    place, token = place.view_as(index), order // index.shape[1]
    hidden = F.grouped_mm(_spread(x, token, place), up.mT, offs=ends)
    a = activated(hidden, gated) * weights.flatten()[order][:, None]
    return _summed(F.grouped_mm(a, down.mT, offs=ends), token, place)


def _rows(x: Float[Tensor, "n d"], token: Int[Tensor, " n*k"]) -> Float[Tensor, "n*k d"]:
    """The token of each choice, sorted."""
    return x.index_select(0, token)


def _sums(z: Float[Tensor, "n*k d"], place: Int[Tensor, "n k"]) -> Float[Tensor, "n d"]:
    """The rows of each token's choices, in their order."""
    return z.index_select(0, place.flatten()).unflatten(0, place.shape).sum(1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return _rows(x, token)

    @staticmethod
    @gradient
    def backward(ctx, dz: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sums(dz, *ctx.saved_tensors), None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _sums(z, place)

    @staticmethod
    @gradient
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _rows(dy, *ctx.saved_tensors), None, None


_spread, _summed = one_step(_Spread), one_step(_Summed)
