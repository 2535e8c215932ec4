"""How parallel branches b_1 .. b_n of one slot become one output. All are (b, t, d) tensors."""

from plait.design.struct import Struct
from plait.design.weights import Constant, Normal, Weight, Weights, projection


class Merge(Struct, frozen=True, kw_only=True):
    """`branch_norm`: norm each branch first, since their scales differ by more than ten (arXiv 2510.04800, table 6)."""

    branch_norm: bool = True

    def check(self, branches: int) -> None:
        """Raise ValueError where this merge does not fit so many branches."""

    def learned(self, dim: int, branches: int) -> Weights:
        return ()

    def mixing(self, dim: int, branches: int) -> int:
        """FLOPs for one token beside those of the weights' matrices."""
        return 0


class Sum(Merge, frozen=True, kw_only=True, tag="sum"):
    """w_1 b_1 + ... + w_n b_n with fixed `weights`; without them all are 1."""

    weights: tuple[float, ...] = ()

    def check(self, branches: int) -> None:
        given = len(self.weights)
        if given not in (0, branches):
            raise ValueError(f"Sum.weights has {given} numbers for {branches} branches")


class Average(Merge, frozen=True, kw_only=True, tag="average"):
    """(b_1 + ... + b_n) / n, Hymba's form (arXiv 2411.13676)."""


class Projection(Merge, frozen=True, kw_only=True, tag="projection"):
    """W [b_1; ...; b_n]."""

    def learned(self, dim: int, branches: int) -> Weights:
        return projection("out_proj", dim, branches * dim, writes=True)


class Gated(Merge, frozen=True, kw_only=True, tag="gated"):
    """sum_i g_i b_i with g = softmax(W u) over the branches, for each token of the slot's input u; starts as the average."""

    def learned(self, dim: int, branches: int) -> Weights:
        return (Weight("gate", (branches, dim), "blocks", Constant(0.0)),)


class MergeAttention(Merge, frozen=True, kw_only=True, tag="merge_attention"):
    """Attention over the branches at each position: w = softmax(q . W_k b_i / sqrt(d)), y = sum_i w_i W_v b_i.

    The query q is learned and the same for all positions.
    """

    def learned(self, dim: int, branches: int) -> Weights:
        query = Weight("query", (dim,), "vector", Normal(1.0))
        return query, *projection("k_proj", dim, dim), *projection("v_proj", dim, dim)

    def mixing(self, dim: int, branches: int) -> int:
        return 2 * (branches - 1) * dim * dim + 2 * branches * dim  # W_k of every branch; W_v once: it commutes


MERGE_KINDS: dict[str, type[Merge]] = {
    "sum": Sum,
    "average": Average,
    "projection": Projection,
    "gated": Gated,
    "merge_attention": MergeAttention,
}
