"""Gated DeltaNet."""

from typing import Self

from plait.design.layers.layer import Mixer, head_sizes, wide_head_dim
from plait.design.layers.rope import RoPE
from plait.design.spec import Memory, recurrent
from plait.design.struct import DERIVED, positive
from plait.design.weights import Constant, Uniform, Weight, Weights, norm, projection, short_conv


class GatedDeltaNet(Mixer, frozen=True, kw_only=True, tag="gated_deltanet"):
    """Gated DeltaNet (arXiv 2412.06464) as laid out in Qwen3-Next; `heads` and `head_dim` are those of q and k.

    `negative_eigenvalues`: strengths up to 2, so that a state can be turned over rather than only emptied (arXiv 2411.12537).
    rope: turns queries and keys by position, as layers that take attention's place do (HypeNet, arXiv 2601.22156).
    `norm_eps` is that of the heads' norm; null: the design's.
    """

    heads: int = DERIVED
    head_dim: int = DERIVED
    value_heads: int = DERIVED
    value_head_dim: int = DERIVED
    conv_width: int = 4
    negative_eigenvalues: bool = False
    rope: RoPE | None = None
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "heads", "head_dim", "value_heads", "value_head_dim", "conv_width", "norm_eps")
        if self.heads and self.value_heads and self.value_heads % self.heads:
            raise ValueError(f"GatedDeltaNet: heads {self.heads} does not divide value_heads {self.value_heads}")

    def resolve(self, dim: int) -> Self:
        name, given = "GatedDeltaNet", self.heads or self.head_dim
        default = 0 if given else wide_head_dim(dim, name)
        heads, head_dim = head_sizes(name, dim, self.heads, self.head_dim, default)
        if self.rope is not None:
            self.rope.check(name, head_dim)
        value_heads, value_head_dim = self.value_heads or heads, self.value_head_dim or head_dim
        if value_heads % heads:
            raise ValueError(f"{name}: heads {heads} does not divide value_heads {value_heads}")
        return self.replace(heads=heads, head_dim=head_dim, value_heads=value_heads, value_head_dim=value_head_dim)

    def inner(self) -> int:
        return self.value_heads * self.value_head_dim

    def rows(self) -> dict[str, int]:
        """Channels of q, k and v (which the convolution sees), of the output gate z, and of b and a, one a head."""
        key, value = self.heads * self.head_dim, self.value_heads * self.value_head_dim
        return {"q": key, "k": key, "v": value, "z": value, "b": self.value_heads, "a": self.value_heads}

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        rows = self.rows()
        return (
            *projection("in_proj", rows, reads or dim),
            *short_conv({name: rows[name] for name in "qkv"}, self.conv_width, bias=False),
            Weight("A_log", (self.value_heads,), "decay", Uniform(0.01, 16, "log")),
            Weight("dt_bias", (self.value_heads,), "decay", Constant(1.0)),
            norm("norm", self.value_head_dim, plain=True),
            *self.output("out_proj", dim),
        )

    def mixing(self, dim: int, context: int) -> int:
        return 3 * 2 * self.value_heads * self.value_head_dim * self.head_dim  # read S k, write, read S q

    def state(self, dim: int, dtype: str) -> Memory:
        rows = self.rows()
        channels, matrix = rows["q"] + rows["k"] + rows["v"], (self.value_heads, self.value_head_dim, self.head_dim)
        return recurrent(matrix, self.conv_width, channels, dtype)
