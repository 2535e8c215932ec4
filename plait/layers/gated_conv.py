"""The gated short convolution of LFM2."""

from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import GatedConv
from plait.design.model import ModelConfig
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.short_conv import ShortConv
from plait.ops.kernels import Call
from plait.state import Shifted


class GatedConvLayer(MixerModule):
    """arXiv 2511.23404, section 2. `in_proj` holds the rows of B, C and x."""

    config: GatedConv
    in_proj: nn.Linear
    conv1d: ShortConv

    @classmethod
    def ops(cls, config: GatedConv, call: Call) -> list[tuple[str, None]]:
        return [("conv", None)]

    def assemble(self, design: ModelConfig) -> None:
        weight, *bias = self.config.convolution()
        self.conv1d = ShortConv(weight, bias[0] if bias else None, silu=False)

    def inner(
        self, x: Float[Tensor, "b t d"], context: Context, state: Shifted | None
    ) -> tuple[Float[Tensor, "b t w"], Shifted | None]:
        write, read, x = self.in_proj(x).chunk(3, -1)
        y, conv = self.conv1d(write * x, context, state and state.conv)
        return read * y, None if conv is None else Shifted(conv)
