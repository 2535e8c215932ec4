"""A projection's parts, which lie side by side in one tensor, and their gradients."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from plait.ops.graph import gradient, one_step
from plait.ops.operator import operator


def parts(x: Float[Tensor, "*b n"], widths: Sequence[int]) -> tuple[Tensor, ...]:
    """`x.split_with_sizes(widths, -1)`. In a graph compiled for a GPU the gradients are put side by side by a copy of its own:
    fused with what makes them, as the compiler does it, each number would go through the formulas of all parts to take one."""
    if torch.compiler.is_compiling() and x.is_cuda:
        return _parts(x, list(widths))
    return x.split_with_sizes(list(widths), -1)


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
        return tuple(x.split_with_sizes(widths, -1))

    @staticmethod
    @gradient
    def backward(ctx, *dparts: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _joined(dparts[0], list(dparts[1:])), None


_parts = one_step(_Parts)


@operator("joined")
def _joined(first: Tensor, others: list[Tensor]) -> Tensor:
    return torch.cat([first, *others], -1)


@torch.library.register_fake("plait::joined")
def _(first, others):
    return first.new_empty(*first.shape[:-1], first.shape[-1] + sum(other.shape[-1] for other in others))
