"""RMSNorm (arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * w over the last axis.

torch has a fused kernel for devices but composes it from many passes on the CPU; there, training uses a form with its
own gradient.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def rms_norm(x: Float[Tensor, "*n d"], weight: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*n d"]:
    """The sum of squares is taken in float32 at least; the result has x's dtype."""
    plain = x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling()
    if plain or x.dtype in (torch.bfloat16, torch.float16):
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return _RMSNorm.apply(x, weight.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)  # (*n, 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = dy * normed
        dweight = product.flatten(0, -2).sum(0)
        along = product.flatten(0, -2).mv(weight).view(scale.shape) / x.shape[-1]
        dx = torch.mul(dy, weight, out=product).addcmul_(normed, along, value=-1).mul_(scale)
        return dx, dweight, None
