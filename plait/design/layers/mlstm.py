"""mLSTM."""

from typing import Self

from plait.design.layers.layer import Mixer, head_sizes, wide_head_dim
from plait.design.spec import Memory, recurrent
from plait.design.struct import DERIVED, positive
from plait.design.weights import Constant, Ramp, Weight, Weights, norm, projection


class MLSTM(Mixer, frozen=True, kw_only=True, tag="mlstm"):
    """mLSTM (xLSTM, arXiv 2405.04517) as laid out in xLSTM-7B (arXiv 2503.13427): a matrix per head with exponential gates,
    normed within heads, times the sigmoid of a gate.

    `head_dim` is that of values, `key_dim` of queries and keys, half of it unless given. Gates are held within `cap`:
    cap tanh(x / cap).
    """

    heads: int = DERIVED
    head_dim: int = DERIVED
    key_dim: int = DERIVED
    cap: float = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "heads", "head_dim", "key_dim", "cap")

    def resolve(self, dim: int) -> Self:
        name, given = "MLSTM", self.heads or self.head_dim
        heads, head_dim = head_sizes(name, dim, self.heads, self.head_dim, 0 if given else wide_head_dim(dim, name))
        if not self.key_dim and head_dim % 2:
            raise ValueError(f"{name}: head_dim {head_dim} is odd, so key_dim must be given")
        return self.replace(heads=heads, head_dim=head_dim, key_dim=self.key_dim or head_dim // 2)

    def inner(self) -> int:
        return self.heads * self.head_dim

    def rows(self) -> dict[str, int]:
        """Channels of q, k, v and of the output gate."""
        keys = self.heads * self.key_dim
        return {"q": keys, "k": keys, "v": self.inner(), "o": self.inner()}

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        h, gates = self.heads, (("i", self.heads), ("f", self.heads))
        return (
            *projection("in_proj", self.rows(), reads or dim),
            Weight("gates_proj.weight", (2 * h, reads or dim), "matrix", Constant(0.0), gates),
            Weight("i_bias", (h,), "decay", Constant(-10.0)),
            Weight("f_bias", (h,), "decay", Ramp(0, 1, h, 3.0, 6.0)),
            norm("norm", self.inner(), plain=True),
            *self.output("out_proj", dim),
        )

    def mixing(self, dim: int, context: int) -> int:
        return 2 * 2 * self.heads * (self.head_dim + 1) * self.key_dim  # write (v, 1) k^T, read C q and n q

    def state(self, dim: int, dtype: str) -> Memory:
        return recurrent((self.heads, self.head_dim + 2, self.key_dim), 1, dim, dtype)
