"""The Mamba-2 layer."""

from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import Mamba2
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm, inner
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.norm import Norm
from plait.ops.conv import causal_conv
from plait.ops.kernels import Call
from plait.ops.rms_norm import gated_rms_norm
from plait.ops.ssd import Gates, ssd
from plait.state import Recurrent, recurrent


class Mamba2Layer(MixerModule):
    """arXiv 2405.21060, section 7. `in_proj` holds the rows of z, x, B, C and dt, as in the published checkpoints."""

    config: Mamba2
    in_proj: nn.Linear
    conv1d_weight: nn.Parameter
    conv1d_bias: nn.Parameter | None
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    D: nn.Parameter
    norm: Norm

    @classmethod
    def ops(cls, config: Mamba2, call: Call) -> list[tuple[str, None]]:
        return [("conv", None), ("ssd", None)]

    def __init__(self, config: Mamba2, design: ModelConfig):
        super().__init__(config, design)
        z, x, B, C, dt = config.rows().values()
        self.widths, self.conv_widths = [z, x + B + C, dt], [x, B, C]
        if not config.conv_bias:
            self.conv1d_bias = None

    def norms(self, design: ModelConfig) -> dict[str, RMSNorm]:
        return {"norm": inner(design.norm).replace(zero_centered=False)}

    def inner(
        self, u: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        c = self.config
        z, xBC, dt = self.in_proj(u).split_with_sizes(self.widths, -1)
        where = {"rows": context.rows, "packing": context.packing}
        conv1d = self.conv1d_weight, self.conv1d_bias
        xBC, conv = causal_conv(xBC, *conv1d, silu=True, state=state and state.conv, **where)
        x, B, C = xBC.split_with_sizes(self.conv_widths, -1)
        x = x.unflatten(-1, (-1, c.head_dim))  # (b, t, h, p)
        B, C = (y.unflatten(-1, (c.groups, -1)) for y in (B, C))  # (b, t, g, n)
        gates = Gates(self.A_log, self.dt_bias, self.D)
        y, s = ssd(C, B, x, dt, gates=gates, state=state and state.s, **where)
        return norm_per_group(y.flatten(2), z, self.norm, c.groups), recurrent(s, conv)


def norm_per_group(x: Float[Tensor, "b t d"], z: Float[Tensor, "b t d"], norm: Norm, groups: int) -> Tensor:
    """norm(x silu(z)), each group's channels normed alone, as in the published models."""
    if groups == 1:
        return norm(x, z, gate_first=True)
    x, z = (y.unflatten(-1, (groups, -1)) for y in (x, z))
    return gated_rms_norm(x, z, norm.weight, norm.config.eps, gate_first=True).flatten(-2)
