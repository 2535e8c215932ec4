"""Merges: how the branches of a parallel slot become one output."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.merges import Average, Gated, Merge, MergeAttention, Projection, Sum

Branch = Float[Tensor, "b t d"]


class SumMerge(nn.Module):
    """b_1 + ... + b_n."""

    def __init__(self, config: Merge, dim: int, branches: int):
        super().__init__()

    def forward(self, u: Branch, branches: list[Branch]) -> Branch:
        return sum(branches[1:], branches[0])


class AverageMerge(nn.Module):
    """The mean of the branches."""

    def __init__(self, config: Merge, dim: int, branches: int):
        super().__init__()

    def forward(self, u: Branch, branches: list[Branch]) -> Branch:
        return sum(branches[1:], branches[0]) / len(branches)


class ProjectionMerge(nn.Module):
    """W [b_1; ...; b_n]."""

    def __init__(self, config: Merge, dim: int, branches: int):
        super().__init__()
        self.out_proj = nn.Linear(branches * dim, dim, bias=False)

    def forward(self, u: Branch, branches: list[Branch]) -> Branch:
        return self.out_proj(torch.cat(branches, -1))


class GatedMerge(nn.Module):
    """sum_i g_i b_i, g = softmax(W u) over the branches."""

    def __init__(self, config: Merge, dim: int, branches: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(branches, dim))

    def forward(self, u: Branch, branches: list[Branch]) -> Branch:
        return weighted(nn.functional.linear(u, self.gate), branches)


class MergeAttentionMerge(nn.Module):
    """Attention over the branches at each position: w = softmax(q . W_k b_i / sqrt(d)), y = sum_i w_i W_v b_i.

    Written with one product per token: q . W_k b = (W_k^T q) . b, and W_v commutes with the weighted sum.
    """

    def __init__(self, config: Merge, dim: int, branches: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(dim))
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        nn.init.normal_(self.query)

    def forward(self, u: Branch, branches: list[Branch]) -> Branch:
        key = (self.k_proj.weight.mT @ self.query) * len(self.query) ** -0.5  # (d,)
        scores = torch.cat([nn.functional.linear(b, key[None]) for b in branches], -1)  # (b, t, n)
        return self.v_proj(weighted(scores, branches))


def weighted(scores: Float[Tensor, "b t n"], branches: list[Branch]) -> Branch:
    """The branches' mean under softmax(scores), the softmax in float32 at least."""
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(branches[0].dtype)
    return sum(w * b for w, b in zip(weights.split(1, -1), branches, strict=True))  # type: ignore[return-value]  # sum of tensors


MERGES: dict[type[Merge], type[nn.Module]] = {
    Sum: SumMerge,
    Average: AverageMerge,
    Projection: ProjectionMerge,
    Gated: GatedMerge,
    MergeAttention: MergeAttentionMerge,
}
