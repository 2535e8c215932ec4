"""KL between two models' logits, and its gradient at the second one's, for the rows of a slice."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from plait.ops.operator import operator
from plait.ops.token import DTYPES


def kl(
    y: Float[Tensor, "n v"],
    theirs: Float[Tensor, "n v"],
    scored: Bool[Tensor, " n"] | None,
    T: float,
    gradient: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n v"] | None]:
    """The sum of T^2 KL(softmax(theirs / T) || softmax(y / T)) over the scored rows, float32 at least, and its gradient at y.
    On a GPU that is in the dtype of y; both are read twice, and nothing else as large is written."""
    if y.is_cuda and y.dtype in DTYPES and theirs.dtype in DTYPES and y.stride(1) == theirs.stride(1) == 1:
        nats, dy = _rows(y, theirs, None if scored is None else scored.float(), T, gradient)
        return nats.sum(), dy if gradient else None
    theirs = theirs.to(torch.promote_types(theirs.dtype, torch.float32)).div(T).log_softmax(-1)
    ours = y.to(torch.promote_types(y.dtype, torch.float32)).div(T).log_softmax(-1)
    p = theirs.exp()
    # what a teacher rules out weighs nothing, however far below it is
    apart = theirs.clamp_min_(torch.finfo(theirs.dtype).min).sub_(ours)
    rowwise = torch.linalg.vecdot(p, apart) * T**2
    left_out = None if scored is None else scored == 0
    total = (rowwise if left_out is None else rowwise.masked_fill(left_out, 0.0)).sum()
    if not gradient:
        return total, None
    dy = ours.exp_().sub_(p).mul_(T)
    return total, dy if left_out is None else dy.masked_fill_(left_out[:, None], 0.0)


@operator("kl")
def _rows(y: Tensor, theirs: Tensor, weights: Tensor | None, T: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """Of each row (n), and the gradient; empty if none is asked for."""
    from plait.ops import kl_triton

    nats = torch.empty(len(y), dtype=torch.float32, device=y.device)
    dy = torch.empty(y.shape if gradient else (0, 0), dtype=y.dtype, device=y.device)
    kl_triton.run(y, theirs, weights, T, nats, dy if gradient else None)
    return nats, dy


@torch.library.register_fake("plait::kl")
def _(y, theirs, weights, T, gradient):
    return y.new_empty(len(y), dtype=torch.float32), y.new_empty(y.shape if gradient else (0, 0))
