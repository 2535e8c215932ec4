"""Kimi delta attention."""

import math
from typing import Self

from plait.design.layers.layer import Mixer, head_sizes, wide_head_dim
from plait.design.layers.rope import RoPE
from plait.design.spec import Memory, recurrent
from plait.design.struct import DERIVED, positive
from plait.design.weights import Uniform, Weight, Weights, norm, projection, short_conv


class KimiDeltaAttention(Mixer, frozen=True, kw_only=True, tag="kimi_delta_attention"):
    """Kimi delta attention (arXiv 2510.26692): the gated delta rule with a decay per key channel, decays and output gate of
    rank `rank` (of a head's values if left out). `negative_eigenvalues`: strengths up to 2 (arXiv 2411.12537). rope: turns
    queries and keys by position."""

    heads: int = DERIVED
    head_dim: int = DERIVED
    value_head_dim: int = DERIVED
    rank: int = DERIVED
    conv_width: int = 4
    negative_eigenvalues: bool = False
    rope: RoPE | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "heads", "head_dim", "value_head_dim", "rank", "conv_width")

    def resolve(self, dim: int) -> Self:
        name = "KimiDeltaAttention"
        default = 0 if self.heads or self.head_dim else wide_head_dim(dim, name)
        heads, head_dim = head_sizes(name, dim, self.heads, self.head_dim, default)
        value_head_dim = self.value_head_dim or head_dim
        if self.rope is not None:
            self.rope.check(name, head_dim)
        return self.replace(
            heads=heads, head_dim=head_dim, value_head_dim=value_head_dim, rank=self.rank or value_head_dim
        )

    def inner(self) -> int:
        return self.heads * self.value_head_dim

    def rows(self) -> dict[str, int]:
        """Channels of q, k and v (which the convolution sees), of what decays and the output gate z are projected from, and of
        the strengths b, one a head."""
        key = self.heads * self.head_dim
        return {"q": key, "k": key, "v": self.inner(), "decay": self.rank, "z": self.rank, "b": self.heads}

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        rows = self.rows()
        return (
            *projection("in_proj", rows, reads or dim),
            *short_conv({name: rows[name] for name in "qkv"}, self.conv_width, bias=False),
            *projection("decay_proj", rows["k"], self.rank),
            Weight("A_log", (self.heads,), "decay", Uniform(1, 16, "log")),
            Weight("dt_bias", (rows["k"],), "decay", Uniform(math.log(1e-3), math.log(0.1), "step")),
            *projection("gate_proj", self.inner(), self.rank),
            norm("norm", self.value_head_dim, plain=True),
            *self.output("out_proj", dim),
        )

    def mixing(self, dim: int, context: int) -> int:
        return 3 * 2 * self.heads * self.value_head_dim * self.head_dim  # read S k, write, read S q

    def state(self, dim: int, dtype: str) -> Memory:
        rows = self.rows()
        channels = rows["q"] + rows["k"] + rows["v"]
        return recurrent((self.heads, self.value_head_dim, self.head_dim), self.conv_width, channels, dtype)
