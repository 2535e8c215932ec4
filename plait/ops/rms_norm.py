"""RMSNorm (arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * w over the last axis; and x / |x|.

torch has a fused kernel for devices but composes it from many passes on the CPU; here a norm takes the fewest passes
that torch's ops allow, and has its own gradient.
"""

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plait.ops.graph import gradient, one_step


def rms_norm(
    x: Float[Tensor, "*n d"], weight: Float[Tensor, " d"], eps: float, zero_centered: bool = False
) -> Float[Tensor, "*n d"]:
    """The sum of squares is taken in float32 at least; the result has x's dtype. `zero_centered`: times 1 + w."""
    if not _by_hand(x):
        weight = 1 + weight if zero_centered else weight
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    if torch.is_grad_enabled():
        return _rms_norm(x, 1 + weight if zero_centered else weight, eps)
    y = x * _scale(x, eps, 1 / x.shape[-1])
    return y.addcmul_(y, weight) if zero_centered else y.mul_(weight)


def l2norm(x: Float[Tensor, "*n k"], eps: float = 1e-6) -> Float[Tensor, "*n k"]:
    """x / |x|, the norm bounded away from 0."""
    if not _by_hand(x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
    return _L2Norm.apply(x, eps) if torch.is_grad_enabled() else x * _scale(x, eps, 1.0)


def _by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()


def _scale(x: Float[Tensor, "*n d"], eps: float, part: float) -> Float[Tensor, "*n 1"]:
    """1 / sqrt(part * sum(x^2) + eps)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_constant(eps, x.dtype), norm, norm, value=part).rsqrt_()


@cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number that torch takes in half the time of a Python one."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps, 1 / x.shape[-1])  # (*n, 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @gradient
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = dy * normed
        dweight = product.flatten(0, -2).sum(0)
        along = product.flatten(0, -2).mv(weight).view(scale.shape) / x.shape[-1]
        dx = torch.mul(dy, weight, out=product).addcmul_(normed, along, value=-1).mul_(scale)
        return dx, dweight, None


class _L2Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps, 1.0)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @gradient
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(dy, y)[..., None]
        return torch.addcmul(dy, y, along, value=-1).mul_(scale), None


_rms_norm = one_step(_RMSNorm)
