"""Mamba-2."""

import math
from typing import Literal, Self

from plait.design.layers.layer import Mixer
from plait.design.spec import Memory, recurrent
from plait.design.struct import DERIVED, between, positive
from plait.design.weights import Constant, Uniform, Weight, Weights, norm, projection, short_conv


class Mamba2(Mixer, frozen=True, kw_only=True, tag="mamba2"):
    """Mamba-2 (arXiv 2405.21060): short convolution, scalar-decay recurrence over a (head_dim, state_dim) state per head.

    output_norm: of the heads' outputs y and the gate z: norm(y silu(z)), each of `groups` of channels normed alone;
    "norm_first": norm(y) silu(z); "none": y silu(z). dt_min, dt_max: the steps are held between them (`time_step_limit`).
    in_bias, out_bias: of the projections. multipliers: on the projected z, x, B, C and dt, in this order (Falcon-H1, arXiv
    2507.22448).
    """

    heads: int = DERIVED
    head_dim: int = 64
    state_dim: int = 128
    groups: int = 1
    expand: int = 2
    conv_width: int = 4
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    output_norm: Literal["gate_first", "norm_first", "none"] = "gate_first"
    dt_min: float = 0.0
    dt_max: float | None = None
    multipliers: tuple[float, float, float, float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "heads", "head_dim", "state_dim", "groups", "expand", "conv_width", "dt_max")
        if self.heads and self.heads % self.groups:
            raise ValueError(f"Mamba2: groups {self.groups} does not divide heads {self.heads}")
        between(self, 0, math.inf if self.dt_max is None else self.dt_max, "dt_min")

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
            *projection("in_proj", rows, reads or dim, bias=self.in_bias),
            *short_conv(rows["x"] + rows["B"] + rows["C"], self.conv_width, self.conv_bias),
            Weight("A_log", heads, "decay", Uniform(1, 16, "log")),
            Weight("dt_bias", heads, "decay", Uniform(math.log(1e-3), math.log(0.1), "step")),
            Weight("D", heads, "decay", Constant(1.0)),
            *((norm("norm", rows["x"], plain=True),) if self.output_norm != "none" else ()),
            *self.output("out_proj", dim, bias=self.out_bias),
        )

    def mixing(self, dim: int, context: int) -> int:
        return 2 * 2 * self.heads * self.head_dim * self.state_dim  # write v k^T, read S q

    def state(self, dim: int, dtype: str) -> Memory:
        rows = self.rows()
        channels = rows["x"] + rows["B"] + rows["C"]
        return recurrent((self.heads, self.head_dim, self.state_dim), self.conv_width, channels, dtype)
