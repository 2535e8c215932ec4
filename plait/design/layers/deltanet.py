"""DeltaNet."""

from typing import Self

from plait.design.layers.layer import Mixer, head_sizes, wide_head_dim
from plait.design.layers.rope import RoPE
from plait.design.spec import Memory, recurrent
from plait.design.struct import DERIVED, positive
from plait.design.weights import Weights, norm, projection, short_conv


class DeltaNet(Mixer, frozen=True, kw_only=True, tag="deltanet"):
    """DeltaNet (arXiv 2406.06484): the delta rule without decay. `negative_eigenvalues`: strengths up to 2, so that a state can
    be turned over rather than only emptied (arXiv 2411.12537). rope: turns queries and keys by position."""

    heads: int = DERIVED
    head_dim: int = DERIVED
    value_head_dim: int = DERIVED
    conv_width: int = 4
    negative_eigenvalues: bool = False
    rope: RoPE | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "heads", "head_dim", "value_head_dim", "conv_width")

    def resolve(self, dim: int) -> Self:
        default = 0 if self.heads or self.head_dim else wide_head_dim(dim, "DeltaNet")
        heads, head_dim = head_sizes("DeltaNet", dim, self.heads, self.head_dim, default)
        if self.rope is not None:
            self.rope.check("DeltaNet", head_dim)
        return self.replace(heads=heads, head_dim=head_dim, value_head_dim=self.value_head_dim or head_dim)

    def inner(self) -> int:
        return self.heads * self.value_head_dim

    def rows(self) -> dict[str, int]:
        """Channels of q, k and v (which the convolution sees), and of the strengths b, one a head."""
        key = self.heads * self.head_dim
        return {"q": key, "k": key, "v": self.inner(), "b": self.heads}

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        rows = self.rows()
        return (
            *projection("in_proj", rows, reads or dim),
            *short_conv({name: rows[name] for name in "qkv"}, self.conv_width, bias=False),
            norm("norm", self.value_head_dim, plain=True),
            *self.output("out_proj", dim),
        )

    def mixing(self, dim: int, context: int) -> int:
        return 3 * 2 * self.heads * self.value_head_dim * self.head_dim  # read S k, write, read S q

    def state(self, dim: int, dtype: str) -> Memory:
        rows = self.rows()
        channels = rows["q"] + rows["k"] + rows["v"]
        return recurrent((self.heads, self.value_head_dim, self.head_dim), self.conv_width, channels, dtype)
