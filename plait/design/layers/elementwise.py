"""HGRN, minGRU and minLSTM: every channel a memory of its own, whose gates see the input alone."""

import math
from typing import ClassVar, Self

from plait.design.layers.layer import Mixer
from plait.design.spec import Memory, recurrent
from plait.design.struct import DERIVED, between, positive
from plait.design.weights import Constant, Weight, Weights, norm, projection, short_conv


class ElementwiseRecurrence(Mixer, frozen=True, kw_only=True):
    """h = a h + b, a and b from the token: out_proj(norm(h) * silu(gate)).

    width: channels of h, the model's width if left out. conv_width: of a convolution before it; null for none.
    """

    projected: ClassVar[tuple[str, ...]] = ()  # what is projected for each channel

    width: int = DERIVED
    conv_width: int | None = 4
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "width", "conv_width")

    def resolve(self, dim: int) -> Self:
        return self.replace(width=self.width or dim)

    def inner(self) -> int:
        return self.width

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        own = reads or dim
        return (
            *(short_conv(own, self.conv_width, self.bias) if self.conv_width else ()),
            *projection("in_proj", dict.fromkeys(self.projected, self.width), own, bias=self.bias),
            *projection("gate_proj", self.width, own),
            *self.own_weights(),
            norm("norm", self.width, plain=True),
            *self.output("out_proj", dim),
        )

    def own_weights(self) -> Weights:
        return ()

    def state(self, dim: int, dtype: str) -> Memory:
        channels = self.wrap.width(dim) if self.wrap else dim
        return recurrent((1, 1, self.width), self.conv_width or 1, channels, dtype)


class MinGRU(ElementwiseRecurrence, frozen=True, kw_only=True, tag="min_gru"):
    """minGRU (arXiv 2410.01201, section 3.1): h = (1 - z) h + z c, z and c from the token alone."""

    projected = ("z", "c")


class MinLSTM(ElementwiseRecurrence, frozen=True, kw_only=True, tag="min_lstm"):
    """minLSTM (arXiv 2410.01201, section 3.2): h = f h + i c, the gates f and i scaled to sum to 1."""

    projected = ("f", "i", "c")


class HGRN(ElementwiseRecurrence, frozen=True, kw_only=True, tag="hgrn"):
    """HGRN (arXiv 2311.04823), real-valued: h = f h + (1 - f) silu(c), f = l + (1 - l) sigmoid(...) at least l.

    lower_bound: where l, learned for each channel, starts; null for none. In the paper it grows with depth, from 0 in the first
    layer to near 1 in the last: say so for each layer by `at`.
    """

    projected = ("f", "c")

    conv_width: int | None = None
    bias: bool = False
    lower_bound: float | None = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 1e-6, 1 - 1e-6, "lower_bound")

    def own_weights(self) -> Weights:
        if self.lower_bound is None:
            return ()
        return (Weight("gamma", (self.width,), "decay", Constant(math.log(self.lower_bound / (1 - self.lower_bound)))),)
