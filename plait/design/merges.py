"""How parallel branches b_1 .. b_n of one slot become one output. All are (b, t, width) tensors."""

from typing import Literal

from plait.design.struct import Struct
from plait.design.weights import Constant, Normal, Weight, Weights, projection


class Merge(Struct, frozen=True, kw_only=True):
    """`branch_norm`: norm each branch first, since their scales differ by more than ten (arXiv 2510.04800, table 6).

    at: "output", what the branches' layers give; or "inner", their heads before the output projection, of which the slot then
    has one, on what is merged (Hymba, arXiv 2411.13676). There branches are single layers, and equally wide for all but
    `projection`.
    """

    branch_norm: bool = True
    at: Literal["output", "inner"] = "output"

    def check(self, widths: tuple[int, ...]) -> None:
        """Raise ValueError where this merge does not fit branches of these widths."""
        if len(set(widths)) > 1:
            raise ValueError(
                f"{type(self).__name__} at inner needs heads of equal width in all branches, got "
                f"{' | '.join(map(str, widths))} channels; change heads or head_dim, or merge by projection"
            )

    def learned(self, dim: int, widths: tuple[int, ...]) -> Weights:
        """What it learns in a model of width `dim`, `widths` those of the branches."""
        out = projection("out_proj", dim, widths[0], writes=True) if self.at == "inner" else ()
        return *self.merging(dim, widths), *out

    def merging(self, dim: int, widths: tuple[int, ...]) -> Weights:
        """The same without the output projection."""
        return ()

    def mixing(self, widths: tuple[int, ...]) -> int:
        """FLOPs for one token beside those of the weights' matrices."""
        return 0


class Sum(Merge, frozen=True, kw_only=True, tag="sum"):
    """w_1 b_1 + ... + w_n b_n with `weights`, which are `fixed`, or learned from there on while their sum stays; without them
    all are 1."""

    weights: tuple[float, ...] = ()
    fixed: bool = True

    def check(self, widths: tuple[int, ...]) -> None:
        super().check(widths)
        given = len(self.weights)
        if given not in (0, len(widths)):
            raise ValueError(f"Sum.weights has {given} numbers for {len(widths)} branches")

    def merging(self, dim: int, widths: tuple[int, ...]) -> Weights:
        return (Weight("shift", (len(widths),), "vector", Constant(0.0)),) if not self.fixed else ()


class Average(Merge, frozen=True, kw_only=True, tag="average"):
    """(b_1 + ... + b_n) / n; at inner Hymba's form (arXiv 2411.13676)."""


class Projection(Merge, frozen=True, kw_only=True, tag="projection"):
    """W [b_1; ...; b_n]."""

    def check(self, widths: tuple[int, ...]) -> None:
        """It takes any."""

    def learned(self, dim: int, widths: tuple[int, ...]) -> Weights:
        return projection("out_proj", dim, sum(widths), writes=True)


class Gated(Merge, frozen=True, kw_only=True, tag="gated"):
    """sum_i g_i b_i with g = softmax(W u) over the branches, for each token of the slot's input u; starts as the average."""

    def merging(self, dim: int, widths: tuple[int, ...]) -> Weights:
        return (Weight("gate", (len(widths), dim), "blocks", Constant(0.0)),)


class MergeAttention(Merge, frozen=True, kw_only=True, tag="merge_attention"):
    """Attention over the branches at each position: w = softmax(q . W_k b_i / sqrt(d)), y = sum_i w_i W_v b_i.

    The query q is learned and the same for all positions.
    """

    def merging(self, dim: int, widths: tuple[int, ...]) -> Weights:
        width = widths[0]
        query = Weight("query", (width,), "vector", Normal(1.0))
        return query, *projection("k_proj", width, width), *projection("v_proj", width, width)

    def mixing(self, widths: tuple[int, ...]) -> int:
        n, width = len(widths), widths[0]
        return 2 * (n - 1) * width * width + 2 * n * width  # W_k of every branch; W_v once: it commutes


MERGE_KINDS: dict[str, type[Merge]] = {
    "sum": Sum,
    "average": Average,
    "projection": Projection,
    "gated": Gated,
    "merge_attention": MergeAttention,
}
