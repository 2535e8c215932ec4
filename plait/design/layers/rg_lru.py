"""RG-LRU, the recurrent block of Griffin."""

from typing import Self

from plait.design.layers.layer import Mixer, head_sizes, wide_head_dim
from plait.design.spec import Memory, recurrent
from plait.design.struct import DERIVED, positive
from plait.design.weights import Constant, Normal, Uniform, Weight, Weights, projection, short_conv


class RGLRU(Mixer, frozen=True, kw_only=True, tag="rg_lru"):
    """Griffin's recurrent block (arXiv 2402.19427): short convolution, a decay per channel and token, a GELU gate.

    The gates of a head's channels read the channels of that head alone.
    """

    heads: int = DERIVED
    head_dim: int = DERIVED
    conv_width: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "heads", "head_dim", "conv_width")

    def resolve(self, dim: int) -> Self:
        name, given = "RGLRU", self.heads or self.head_dim
        heads, head_dim = head_sizes(name, dim, self.heads, self.head_dim, 0 if given else wide_head_dim(dim, name))
        return self.replace(heads=heads, head_dim=head_dim)

    def inner(self) -> int:
        return self.heads * self.head_dim

    def convolution(self) -> Weights:
        return short_conv(self.inner(), self.conv_width, bias=True)

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        heads, k = self.heads, self.head_dim
        gates = (("write", heads * k), ("forget", heads * k))  # of what is written, and of the decay
        return (
            *projection("in_proj", {"x": self.inner(), "gate": self.inner()}, reads or dim, bias=True),
            *self.convolution(),
            Weight("gates.weight", (heads, 2 * k, k), "blocks", Normal(k**-0.5), gates),  # head by head
            Weight("gates.bias", (2 * heads * k,), "bias", Constant(0.0), gates),
            Weight("Lambda", (heads, k), "decay", Uniform(0.9, 0.999, "rg_lru")),
            *self.output("out_proj", dim, bias=True),
        )

    def state(self, dim: int, dtype: str) -> Memory:
        return recurrent((1, self.heads, self.head_dim), self.conv_width, self.inner(), dtype)
