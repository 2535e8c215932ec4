"""Choices in the order of their experts: each expert's tokens side by side, in as many as there are; nothing is padded or
dropped."""

import torch
from jaxtyping import Int
from torch import Tensor


def by_expert(index: Int[Tensor, "n k"], experts: int) -> tuple[Int[Tensor, " n*k"], Int[Tensor, " e"]]:
    """Of n tokens with k experts each: the choices' numbers, sorted by expert, and where the group of each expert ends."""
    chosen, order = index.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, torch.arange(experts, device=order.device), right=True, out_int32=True)
    return order, ends
