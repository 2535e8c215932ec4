"""The Mamba-2 layer."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import Mamba2, told
from plait.design.model import ModelConfig
from plait.layers.context import Context
from plait.layers.norm import Norm
from plait.ops.conv import causal_conv
from plait.ops.kernels import cast
from plait.ops.ssd import ssd
from plait.state import Recurrent, recurrent


class Mamba2Layer(nn.Module):
    """arXiv 2405.21060, section 7. `in_proj` holds the rows of z, x, B, C and dt, as in the published checkpoints."""

    def __init__(self, config: Mamba2, design: ModelConfig):
        super().__init__()
        self.config = config
        inner, conv = config.widths()
        keys = config.groups * config.state_dim
        heads = told(config.heads)
        self.widths, self.conv_widths = [inner, conv, heads], [inner, keys, keys]
        self.in_proj = nn.Linear(design.dim, sum(self.widths), bias=False)
        self.conv1d_weight = nn.Parameter(torch.empty(conv, config.conv_width))
        self.conv1d_bias = nn.Parameter(torch.empty(conv)) if config.conv_bias else None
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = Norm(inner, design.norm.replace(zero_centered=False))
        self.out_proj = nn.Linear(inner, design.dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A ~ U(1, 16); dt_bias such that softplus gives a step log-uniform in [1e-3, 0.1]; D = 1."""
        nn.init.uniform_(self.A_log, 1, 16).data.log_()
        step = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias.data.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        nn.init.ones_(self.D)
        reset_conv(self.conv1d_weight, self.conv1d_bias)

    def forward(
        self, u: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        c = self.config
        z, xBC, dt = self.in_proj(u).split_with_sizes(self.widths, -1)
        xBC, conv = causal_conv(
            xBC, self.conv1d_weight, self.conv1d_bias, state=state and state.conv, packing=context.packing
        )
        x, B, C = F.silu(xBC).split_with_sizes(self.conv_widths, -1)
        x = x.unflatten(-1, (-1, c.head_dim))  # (b, t, h, p)
        B, C = (y.unflatten(-1, (c.groups, -1)) for y in (B, C))  # (b, t, g, n)
        dt = F.softplus(cast(dt, self.dt_bias.dtype) + self.dt_bias)  # (b, t, h)
        g = -self.A_log.exp() * dt
        y, s = ssd(C, B, x * cast(dt[..., None], x.dtype), g, state=state and state.s, packing=context.packing)
        y = torch.addcmul(y, x, cast(self.D[:, None], x.dtype)).flatten(2)
        out = self.out_proj(norm_per_group(y * F.silu(z), self.norm, c.groups))
        return out, recurrent(s, conv)


def norm_per_group(x: Float[Tensor, "b t d"], norm: Norm, groups: int) -> Float[Tensor, "b t d"]:
    """Each group's channels normed alone, as in the published models."""
    if groups == 1:
        return norm(x)
    x = x.unflatten(-1, (groups, -1))
    return F.rms_norm(x, x.shape[-1:], eps=norm.config.eps).flatten(-2) * norm.weight.to(x.dtype)


def reset_conv(weight: nn.Parameter, bias: nn.Parameter | None) -> None:
    """Uniform in +-1/sqrt(width), torch's default for a depthwise convolution."""
    bound = weight.shape[1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)
