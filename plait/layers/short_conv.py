"""The short convolution in front of a recurrence."""

from jaxtyping import Float
from torch import Tensor, nn

from plait.design.weights import Weight
from plait.layers.context import Context
from plait.layers.start import empty
from plait.ops.conv import causal_conv


class ShortConv(nn.Module):
    """SiLU of a causal filter per channel, or the filter alone: `forward(x, context, tail)` gives it and, where a tail was
    given, the next one."""

    def __init__(self, weight: Weight, bias: Weight | None, silu: bool = True):
        super().__init__()
        self.silu = silu
        self.weight, self.bias = empty(weight), None if bias is None else empty(bias)  # (d, w), (d,)

    def forward(
        self, x: Float[Tensor, "b t d"], context: Context, tail: Float[Tensor, "n w-1 d"] | None
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "n w-1 d"] | None]:
        rows, packing = context.rows, context.packing
        y, tail = causal_conv(x, self.weight, self.bias, silu=self.silu, state=tail, rows=rows, packing=packing)
        return y, tail
