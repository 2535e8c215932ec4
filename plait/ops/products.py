"""Products with a weight matrix, in the form that the processor is quick at."""

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plait.ops.instructions import cpu_bfloat16

FEW = 8  # rows from which on it is quicker to widen the matrix than to take 16 bits one by one (AVX2: 4 to 8)


def linear(
    x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*n o"]:
    """`F.linear`. Of many rows in 16 bits on a processor without instructions for them it is taken in float32 and rounded once:
    as torch does it there, one number at a time, it takes 7 times as long with AVX2."""
    if widens(x, weight):
        wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(x.dtype)
    return F.linear(x, weight, bias)


def multiply(x: Float[Tensor, "n i"], weight: Float[Tensor, "o i"], out: Float[Tensor, "n o"]) -> None:
    """`linear`, written there, without gradients."""
    if widens(x, weight):
        out.copy_(linear(x, weight))
    else:
        torch.mm(x, weight.mT, out=out)


def widens(x: Float[Tensor, "*n i"], weight: Tensor) -> bool:
    """Whether products of these rows are taken in float32 and rounded once."""
    if x.dtype not in SLOW or x.device.type != "cpu" or weight.dtype != x.dtype or x.numel() < FEW * x.shape[-1]:
        return False
    return not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling() and SLOW[x.dtype]()


@cache
def _no_bfloat16() -> bool:
    return cpu_bfloat16() is None


@cache
def _no_float16() -> bool:
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported())


SLOW = {torch.bfloat16: _no_bfloat16, torch.float16: _no_float16}
