"""The gates of an RG-LRU (Griffin, arXiv 2402.19427, section 2.4), from their projections to a scan's a and b."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from plait.ops.graph import gradient, one_step
from plait.ops.kernels import full_precision, wide

C = 8.0  # of the paper


def rg_lru_gates(
    x: Float[Tensor, "b t 1 h k"],
    write: Float[Tensor, "b t 1 h k"],
    forget: Float[Tensor, "b t 1 h k"],
    Lambda: Float[Tensor, "h k"],
    first: Bool[Tensor, "b t 1 1 1"],
) -> tuple[Float[Tensor, "b t 1 h k"], Float[Tensor, "b t 1 h k"]]:
    """a = exp(-8 softplus(Lambda) sigmoid(forget)) and b = sqrt(1 - a^2) sigmoid(write) x, the root 1 where a token is the
    `first` of its sequence. At least float32."""
    with full_precision(x.device):
        return _gates(wide(x), wide(write), wide(forget), wide(Lambda), first)


class _Gates(torch.autograd.Function):
    """With the gradient written out: it keeps the projections alone, and divides by no root m = sqrt(1 - a^2) that may be 0.
    What reaches g = log a = -8 softplus(Lambda) r is dg = da a - dm a^2 / m. Both r and Lambda want it times g, and g / m
    goes to 0.
    """

    @staticmethod
    def forward(ctx, x: Tensor, write: Tensor, forget: Tensor, Lambda: Tensor, first: Tensor):
        ctx.save_for_backward(x, write, forget, Lambda, first)
        g = torch.sigmoid(forget).mul_(F.softplus(Lambda).mul_(-C))
        return g.exp(), torch.sigmoid(write).mul_(_root(g, first)).mul_(x)

    @staticmethod
    @gradient
    def backward(ctx, da: Tensor, db: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, write, forget, Lambda, first = ctx.saved_tensors
        i, r, rate = torch.sigmoid(write), torch.sigmoid(forget), F.softplus(Lambda)
        g = r * (-C * rate)
        a, m = g.exp(), _root(g, first)
        dx = db * m * i
        dwrite = dx * x * (1 - i)
        pulled = torch.where(first, 0.0, db * i * x * a * g / m.clamp_(min=torch.finfo(m.dtype).tiny))
        dgg = (da * g).sub_(pulled).mul_(a)  # dg g
        dLambda = dgg.sum((0, 1, 2)) * torch.where(rate > 0, torch.sigmoid(Lambda) / rate, 1.0)
        return dx, dwrite, dgg * (1 - r), dLambda, None


_gates = one_step(_Gates)


def _root(g: Tensor, first: Tensor) -> Tensor:
    """sqrt(1 - a^2), to the last digit where a is near 1."""
    nothing_before = torch.zeros_like(first, dtype=g.dtype).masked_fill_(first, -torch.inf)
    return torch.add(nothing_before, g, alpha=2).expm1_().neg_().sqrt_()
