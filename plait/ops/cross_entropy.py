"""Cross-entropy of logits, and its gradient at them, for the rows of a slice."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.ops.operator import operator
from plait.ops.token import DTYPES


def cross_entropy(
    y: Float[Tensor, "n v"], target: Int[Tensor, " n"], gradient: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, "n v"] | None]:
    """The sum of -log softmax(y)[target] over the rows whose target is not negative, float32 at least, and its gradient at y.
    On a GPU that is in the dtype of y, which is read twice and written once."""
    if y.is_cuda and y.dtype in DTYPES and y.stride(1) == 1:
        nats, dy = _rows(y, target, gradient)
        return nats.sum(), dy if gradient else None
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    scored = (target >= 0).to(y.dtype)[:, None]
    target = target.clamp_min(0)[:, None]
    p = y.softmax(-1)  # (n, v)
    # the largest is never rounded to 0, and all others are as far below it as their logits are
    logp = y.gather(1, target) - y.amax(-1, keepdim=True) + p.amax(-1, keepdim=True).log()
    total = -(logp * scored).sum()
    return total, p.scatter_add_(1, target, -torch.ones_like(scored)).mul_(scored) if gradient else None


@operator("cross_entropy")
def _rows(y: Tensor, target: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Of each row (n), and the gradient; empty if none is asked for."""
    from plait.ops import cross_entropy_triton

    nats = torch.empty(len(y), dtype=torch.float32, device=y.device)
    dy = torch.empty(y.shape if gradient else (0, 0), dtype=y.dtype, device=y.device)
    cross_entropy_triton.run(y, target, nats, dy if gradient else None)
    return nats, dy


@torch.library.register_fake("plait::cross_entropy")
def _(y, target, gradient):
    return y.new_empty(len(y), dtype=torch.float32), y.new_empty(y.shape if gradient else (0, 0))
