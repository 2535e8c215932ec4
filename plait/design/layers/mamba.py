"""Mamba-1."""

import math
from typing import Self

from plait.design.layers.layer import Mixer
from plait.design.spec import Memory, recurrent
from plait.design.struct import DERIVED, positive
from plait.design.weights import Constant, Ramp, Uniform, Weight, Weights, norm, projection, short_conv


class Mamba(Mixer, frozen=True, kw_only=True, tag="mamba"):
    """Mamba (arXiv 2312.00752): short convolution, and `state_dim` numbers for each of `inner_dim` channels, which decay at
    rates of their own in steps that the token chooses.

    inner_dim: expand * dim if left out. dt_rank: of the projection that makes the steps, dim / 16 if left out. norms:
    RMSNorms of the steps, B and C, as in Jamba and, with weights of 1, in Falcon-Mamba. in_bias, out_bias: of the projections.
    """

    inner_dim: int = DERIVED
    state_dim: int = 16
    dt_rank: int = DERIVED
    expand: int = 2
    conv_width: int = 4
    conv_bias: bool = True
    norms: bool = False
    in_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "inner_dim", "state_dim", "dt_rank", "expand", "conv_width")

    def resolve(self, dim: int) -> Self:
        return self.replace(inner_dim=self.inner_dim or self.expand * dim, dt_rank=self.dt_rank or -(-dim // 16))

    def inner(self) -> int:
        return self.inner_dim

    def selected(self) -> dict[str, int]:
        """What is projected from the channels for all of them: the steps in short, where to write, and what to read."""
        return {"dt": self.dt_rank, "B": self.state_dim, "C": self.state_dim}

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        inner, step = self.inner_dim, self.dt_rank**-0.5
        return (
            *projection("in_proj", {"x": inner, "z": inner}, reads or dim, bias=self.in_bias),
            *short_conv(inner, self.conv_width, self.conv_bias),
            *projection("x_proj", self.selected(), inner),
            *(norm(f"{name}_norm", width, plain=True) for name, width in self.selected().items() if self.norms),
            Weight("dt_proj.weight", (inner, self.dt_rank), "matrix", Uniform(-step, step)),
            Weight("dt_bias", (inner,), "decay", Uniform(math.log(1e-3), math.log(0.1), "step")),
            Weight("A_log", (inner, self.state_dim), "decay", Ramp(0, 1, self.state_dim, 1, self.state_dim, "log")),
            Weight("D", (inner,), "decay", Constant(1.0)),
            *self.output("out_proj", dim, bias=self.out_bias),
        )

    def mixing(self, dim: int, context: int) -> int:
        return 2 * 2 * self.inner_dim * self.state_dim  # write u B, read h C

    def state(self, dim: int, dtype: str) -> Memory:
        return recurrent((1, self.inner_dim, self.state_dim), self.conv_width, self.inner_dim, dtype)
