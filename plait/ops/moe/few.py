"""Experts for few tokens, of shapes that follow from the call's alone, so that the host need not know who chose whom: a step
that a CUDA graph holds, or that is decoded without waiting for the device."""

import torch
from torch import Tensor

from plait.ops.moe.activation import activated


def run(x: Tensor, up: Tensor, down: Tensor, index: Tensor, weights: Tensor, gated: bool) -> Tensor:
    """Shapes as in `experts`, batch and time as one."""
    return (
        _chosen(x, up, down, index, weights, gated)
        if index.numel() <= len(up)
        else _all(x, up, down, index, weights, gated)
    )


def _chosen(x: Tensor, up: Tensor, down: Tensor, index: Tensor, weights: Tensor, gated: bool) -> Tensor:
    """The matrices of each token's experts, side by side: less to read than those of all experts."""
    (n, k), chosen = index.shape, index.flatten()
    hidden = torch.bmm(up[chosen].view(n, -1, x.shape[1]), x[:, :, None])  # (n, k h or k 2h, 1)
    a = activated(hidden.view(n * k, -1), gated) * weights.reshape(-1, 1)
    return torch.bmm(down[chosen], a[:, :, None]).view(n, k, -1).sum(1)


def _all(x: Tensor, up: Tensor, down: Tensor, index: Tensor, weights: Tensor, gated: bool) -> Tensor:
    """Every expert on every token, most of it times 0: as much to read as there is, and few tokens cost no more than one."""
    share = weights.new_zeros(len(x), len(up)).scatter(1, index, weights)  # (n, e)
    a = activated(torch.matmul(x, up.mT), gated)  # (e, n, h)
    return torch.bmm(a * share.mT[..., None], down.mT).sum(0)
