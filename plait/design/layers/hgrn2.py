"""HGRN-2."""

from typing import Self

from plait.design.layers.layer import Mixer, divided, wide_head_dim
from plait.design.spec import Memory, recurrent
from plait.design.struct import DERIVED, positive
from plait.design.weights import Constant, Weight, Weights, norm, projection


class HGRN2(Mixer, frozen=True, kw_only=True, tag="hgrn2"):
    """HGRN-2 (arXiv 2404.07904): forget gates f that are 1 - k, never below a bound, and a state expanded by outer products.

    `state_dim` (k of a head) is the expansion; heads default to as many as make the forget gates as wide as the model.
    `lower_bound`: of all forget gates, 0 to 1; left out it is learned, channel by channel.
    `norm_eps` is that of the norm; null: the design's.
    """

    heads: int = DERIVED
    state_dim: int = DERIVED
    head_dim: int = DERIVED
    lower_bound: float | None = None
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "heads", "state_dim", "head_dim", "norm_eps")
        if self.lower_bound is not None and not 0 <= self.lower_bound < 1:
            raise ValueError(f"HGRN2.lower_bound must be at least 0 and below 1, got {self.lower_bound}")

    def resolve(self, dim: int) -> Self:
        state_dim = self.state_dim or (dim // self.heads if self.heads else wide_head_dim(dim, "HGRN2"))
        heads = self.heads or divided("HGRN2", "heads", dim, state_dim)
        return self.replace(
            heads=heads, state_dim=state_dim, head_dim=self.head_dim or divided("HGRN2", "head_dim", dim, heads)
        )

    def inner(self) -> int:
        return self.heads * self.head_dim

    def rows(self) -> dict[str, int]:
        """Channels of q, of the forget gates f, and of the inputs i."""
        key = self.heads * self.state_dim
        return {"q": key, "f": key, "i": self.inner()}

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        rows = self.rows()
        bound = Weight("bound", (rows["f"],), "decay", Constant(0.0))  # a sigmoid of it
        return (
            *projection("in_proj", rows, reads or dim),
            *((bound,) if self.lower_bound is None else ()),
            norm("norm", self.inner()),
            *self.output("out_proj", dim),
        )

    def mixing(self, dim: int, context: int) -> int:
        return 2 * 2 * self.heads * self.head_dim * self.state_dim  # write v k^T, read S q

    def state(self, dim: int, dtype: str) -> Memory:
        return recurrent((self.heads, self.head_dim, self.state_dim), 1, dim, dtype)
