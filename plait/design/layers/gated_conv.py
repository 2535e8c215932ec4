"""A gated short convolution."""

from typing import Self

from plait.design.layers.layer import Mixer
from plait.design.spec import Leaf, Memory
from plait.design.struct import DERIVED, positive
from plait.design.weights import Weights, projection, short_conv


class GatedConv(Mixer, frozen=True, kw_only=True, tag="gated_conv"):
    """LFM2's gated short convolution (arXiv 2511.23404): out(C * conv(B * x)), with B, C and x from the token.

    width: channels of each, the model's width if left out. conv_width: how many tokens a filter sees.
    bias: of both projections and of the convolution.
    """

    width: int = DERIVED
    conv_width: int = 3
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "width", "conv_width")

    def resolve(self, dim: int) -> Self:
        return self.replace(width=self.width or dim)

    def inner(self) -> int:
        return self.width

    def convolution(self) -> Weights:
        return short_conv(self.width, self.conv_width, self.bias)

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        return (
            *projection("in_proj", dict.fromkeys(("B", "C", "x"), self.width), reads or dim, bias=self.bias),
            *self.convolution(),
            *self.output("out_proj", dim, bias=self.bias),
        )

    def state(self, dim: int, dtype: str) -> Memory:
        return Memory("shifted", (Leaf("conv", (self.width,), dtype, keep=self.conv_width - 1),))
