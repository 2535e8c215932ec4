"""How parallel branches b_1 .. b_n of one slot become one output. All are (b, t, d) tensors."""

from plait.design.struct import Struct


class Merge(Struct, frozen=True, kw_only=True):
    """`branch_norm`: RMSNorm each branch first, since their scales differ by more than ten (arXiv 2510.04800, table 6)."""

    branch_norm: bool = True

    def parameters(self, dim: int, branches: int) -> int:
        return 0

    def matrix(self, dim: int, branches: int) -> int:
        """Multiply-adds for one token."""
        return 0


class Sum(Merge, frozen=True, kw_only=True, tag="sum"):
    """b_1 + ... + b_n."""


class Average(Merge, frozen=True, kw_only=True, tag="average"):
    """(b_1 + ... + b_n) / n, Hymba's form (arXiv 2411.13676)."""


class Projection(Merge, frozen=True, kw_only=True, tag="projection"):
    """W [b_1; ...; b_n]."""

    def parameters(self, dim: int, branches: int) -> int:
        return branches * dim * dim

    def matrix(self, dim: int, branches: int) -> int:
        return branches * dim * dim


class Gated(Merge, frozen=True, kw_only=True, tag="gated"):
    """sum_i g_i b_i with g = softmax(W u) over the branches, for each token of the slot's input u; starts as the average."""

    def parameters(self, dim: int, branches: int) -> int:
        return branches * dim

    def matrix(self, dim: int, branches: int) -> int:
        return branches * dim


class MergeAttention(Merge, frozen=True, kw_only=True, tag="merge_attention"):
    """Attention over the branches at each position: w = softmax(q . W_k b_i / sqrt(d)), y = sum_i w_i W_v b_i.

    The query q is learned and the same for all positions.
    """

    def parameters(self, dim: int, branches: int) -> int:
        return 2 * dim * dim + dim

    def matrix(self, dim: int, branches: int) -> int:
        return dim * dim + branches * dim  # W_v commutes with the weighted sum, and W_k^T q is one vector per call


MERGE_KINDS: dict[str, type[Merge]] = {
    "sum": Sum,
    "average": Average,
    "projection": Projection,
    "gated": Gated,
    "merge_attention": MergeAttention,
}
