"""Mamba-2."""

import math
from typing import Self

from plait.design.layers.layer import Mixer
from plait.design.spec import Memory, recurrent
from plait.design.struct import DERIVED, positive
from plait.design.weights import Constant, Uniform, Weight, Weights, norm, projection, short_conv


class Mamba2(Mixer, frozen=True, kw_only=True, tag="mamba2"):
    """Mamba-2 (arXiv 2405.21060): short convolution, scalar-decay recurrence over a (head_dim, state_dim) state per head."""

    heads: int = DERIVED
    head_dim: int = 64
    state_dim: int = 128
    groups: int = 1
    expand: int = 2
    conv_width: int = 4
    conv_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "heads", "head_dim", "state_dim", "groups", "expand", "conv_width")
        if self.heads and self.heads % self.groups:
            raise ValueError(f"Mamba2: groups {self.groups} does not divide heads {self.heads}")

    def resolve(self, dim: int) -> Self:
        if self.heads is None and (self.expand * dim) % self.head_dim:
            raise ValueError(
                f"Mamba2: expand * dim = {self.expand * dim} is not a multiple of head_dim {self.head_dim}; give heads"
            )
        return self.replace(heads=self.heads or self.expand * dim // self.head_dim)

    def inner(self) -> int:
        return self.heads * self.head_dim

    def rows(self) -> dict[str, int]:
        """Channels of the gate z, of x, B and C (which the convolution sees), and of the steps dt."""
        inner, keys = self.heads * self.head_dim, self.groups * self.state_dim
        return {"z": inner, "x": inner, "B": keys, "C": keys, "dt": self.heads}

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        rows, heads = self.rows(), (self.heads,)
        return (
            *projection("in_proj", rows, reads or dim),
            *short_conv(rows["x"] + rows["B"] + rows["C"], self.conv_width, self.conv_bias),
            Weight("A_log", heads, "decay", Uniform(1, 16, "log")),
            Weight("dt_bias", heads, "decay", Uniform(math.log(1e-3), math.log(0.1), "step")),
            Weight("D", heads, "decay", Constant(1.0)),
            norm("norm", rows["x"], plain=True),
            *self.output("out_proj", dim),
        )

    def mixing(self, dim: int, context: int) -> int:
        return 2 * 2 * self.heads * self.head_dim * self.state_dim  # write v k^T, read S q

    def state(self, dim: int, dtype: str) -> Memory:
        rows = self.rows()
        channels = rows["x"] + rows["B"] + rows["C"]
        return recurrent((self.heads, self.head_dim, self.state_dim), self.conv_width, channels, dtype)
