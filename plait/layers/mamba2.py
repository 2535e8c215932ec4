"""The Mamba-2 layer."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import Mamba2
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm, inner
from plait.layers.context import Context
from plait.layers.declared import LayerModule
from plait.layers.norm import Norm
from plait.ops.conv import causal_conv
from plait.ops.kernels import Call, cast
from plait.ops.ssd import ssd
from plait.state import Recurrent, recurrent


class Mamba2Layer(LayerModule):
    """arXiv 2405.21060, section 7. `in_proj` holds the rows of z, x, B, C and dt, as in the published checkpoints."""

    config: Mamba2
    in_proj: nn.Linear
    conv1d_weight: nn.Parameter
    conv1d_bias: nn.Parameter | None
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    D: nn.Parameter
    norm: Norm
    out_proj: nn.Linear

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

    def forward(
        self, u: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        c = self.config
        z, xBC, dt = self.in_proj(u).split_with_sizes(self.widths, -1)
        xBC, conv = causal_conv(
            xBC,
            self.conv1d_weight,
            self.conv1d_bias,
            state=state and state.conv,
            rows=context.rows,
            packing=context.packing,
        )
        x, B, C = F.silu(xBC).split_with_sizes(self.conv_widths, -1)
        x = x.unflatten(-1, (-1, c.head_dim))  # (b, t, h, p)
        B, C = (y.unflatten(-1, (c.groups, -1)) for y in (B, C))  # (b, t, g, n)
        dt = F.softplus(cast(dt, self.dt_bias.dtype) + self.dt_bias)  # (b, t, h)
        g = -self.A_log.exp() * dt
        y, s = ssd(
            C,
            B,
            x * cast(dt[..., None], x.dtype),
            g,
            state=state and state.s,
            rows=context.rows,
            packing=context.packing,
        )
        y = torch.addcmul(y, x, cast(self.D[:, None], x.dtype)).flatten(2)
        out = self.out_proj(norm_per_group(y * F.silu(z), self.norm, c.groups))
        return out, recurrent(s, conv)


def norm_per_group(x: Float[Tensor, "b t d"], norm: Norm, groups: int) -> Float[Tensor, "b t d"]:
    """Each group's channels normed alone, as in the published models."""
    if groups == 1:
        return norm(x)
    x = x.unflatten(-1, (groups, -1))
    return F.rms_norm(x, x.shape[-1:], eps=norm.config.eps).flatten(-2) * norm.weight.to(x.dtype)
