"""Merges: how the branches of a parallel slot become one output."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.merges import Average, Gated, Merge, MergeAttention, Projection, Sum
from plait.design.norms import RMSNorm
from plait.layers.declared import DeclaredModule

Branch = Float[Tensor, "b t d"]


class MergeModule(DeclaredModule):
    """`forward(u, branches)`: u is what all branches read; `widths` are the branches'. Its parameters are those that the config
    declares; at inner what is merged goes through its output projection."""

    out_proj: nn.Linear | None

    def __init__(self, config: Merge, dim: int, widths: tuple[int, ...]):
        super().__init__()
        self.declare(config.learned(dim, widths), RMSNorm())
        if not hasattr(self, "out_proj"):
            self.out_proj = None

    def forward(self, u: Branch, branches: list[Branch]) -> Branch:
        y = self.merged(u, branches)
        return y if self.out_proj is None else self.out_proj(y)

    def merged(self, u: Branch, branches: list[Branch]) -> Branch:
        raise NotImplementedError


class SumMerge(MergeModule):
    """w_1 b_1 + ... + w_n b_n. What is learned of the weights is how far they are from where they started: `shift` but for its
    mean."""

    shift: nn.Parameter | None

    def __init__(self, config: Sum, dim: int, widths: tuple[int, ...]):
        super().__init__(config, dim, widths)
        self.start = config.weights or (1.0,) * len(widths)
        self.plain = not config.weights and config.fixed
        if config.fixed:
            self.shift = None

    def weights(self) -> Sequence[float | Tensor]:
        """What each branch is multiplied by."""
        if self.shift is None:
            return self.start
        return [w + s for w, s in zip(self.start, self.shift - self.shift.mean(), strict=True)]

    def merged(self, u: Branch, branches: list[Branch]) -> Branch:
        if not self.plain:
            branches = [w * b for w, b in zip(self.weights(), branches, strict=True)]
        return sum(branches[1:], branches[0])


class AverageMerge(MergeModule):
    """The mean of the branches."""

    def merged(self, u: Branch, branches: list[Branch]) -> Branch:
        return sum(branches[1:], branches[0]) / len(branches)


class ProjectionMerge(MergeModule):
    """W [b_1; ...; b_n], W the output projection."""

    def merged(self, u: Branch, branches: list[Branch]) -> Branch:
        return torch.cat(branches, -1)


class GatedMerge(MergeModule):
    """sum_i g_i b_i, g = softmax(W u) over the branches."""

    gate: nn.Parameter

    def merged(self, u: Branch, branches: list[Branch]) -> Branch:
        return weighted(F.linear(u, self.gate), branches)


class MergeAttentionMerge(MergeModule):
    """Attention over the branches at each position: w = softmax(q . W_k b_i / sqrt(d)), y = sum_i w_i W_v b_i.

    W_v commutes with the weighted sum, so it is called once.
    """

    query: nn.Parameter
    k_proj: nn.Linear
    v_proj: nn.Linear

    def merged(self, u: Branch, branches: list[Branch]) -> Branch:
        query = (self.query * len(self.query) ** -0.5)[None]
        scores = torch.cat([F.linear(self.k_proj(b), query) for b in branches], -1)  # (b, t, n)
        return self.v_proj(weighted(scores, branches))


def weighted(scores: Float[Tensor, "b t n"], branches: list[Branch]) -> Branch:
    """The branches' mean under softmax(scores), the softmax in float32 at least."""
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(branches[0].dtype)
    return sum(w * b for w, b in zip(weights.split(1, -1), branches, strict=True))  # type: ignore[return-value]  # sum of tensors


MERGES: dict[type[Merge], type[MergeModule]] = {
    Sum: SumMerge,
    Average: AverageMerge,
    Projection: ProjectionMerge,
    Gated: GatedMerge,
    MergeAttention: MergeAttentionMerge,
}
