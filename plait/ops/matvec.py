"""Products of one row and a matrix, as in a decoding step of one sequence: on a GPU as fast as the matrix is read."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from plait.ops.operator import operator
from plait.ops.token import DTYPES


class OneRow(TorchFunctionMode):
    """Inside the block, `F.linear` of one row is this kernel's, whoever calls it: for a block that is captured, as each of
    torch's functions takes longer in it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and fits(*args, **(kwargs or {})):
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def fits(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    x, w = input, weight
    plain = (
        type(w) in (Tensor, torch.nn.Parameter)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
    )
    return plain and x.is_cuda and x.numel() == x.shape[-1] and x.dtype == w.dtype in DTYPES and w.is_contiguous()


def linear(
    input: Float[Tensor, "*n d"], weight: Float[Tensor, "o d"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*n o"]:
    """weight x + bias, summed in float32. The names are `F.linear`'s."""
    return _product(input.contiguous(), weight, bias)


@operator("matvec")
def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from plait.ops import matvec_triton

    y = x.new_empty(*x.shape[:-1], len(weight))
    matvec_triton.run(x, weight, bias, y)
    return y


@torch.library.register_fake("plait::matvec")
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))
