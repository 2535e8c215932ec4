"""The Mamba-1 layer."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import Mamba
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm, inner
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.norm import Norm
from plait.layers.short_conv import ShortConv
from plait.ops.kernels import Call, cast
from plait.ops.selective import selective_scan
from plait.state import Recurrent, recurrent


class MambaLayer(MixerModule):
    """arXiv 2312.00752, section 3.4. `in_proj` holds the rows of x and z, `x_proj` those of dt, B and C, as in the published
    checkpoints, whose `dt_proj.bias` is `dt_bias` here."""

    config: Mamba
    in_proj: nn.Linear
    conv1d: ShortConv
    x_proj: nn.Linear
    dt_proj: nn.Linear
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter

    @classmethod
    def ops(cls, config: Mamba, call: Call) -> list[tuple[str, None]]:
        return [("conv", None), ("selective", None)]

    def assemble(self, design: ModelConfig) -> None:
        widths, norm = self.config.selected(), RMSNorm(eps=inner(design.norm).eps)
        self.widths, self.normed = list(widths.values()), [f"{name}_norm" for name in widths if self.config.norms]
        for name, width in zip(self.normed, self.widths, strict=False):
            self.add_module(name, Norm(width, norm))

    def inner(
        self, u: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        x, z = self.in_proj(u).chunk(2, -1)
        x, conv = self.conv1d(x, context, state and state.conv)
        selected = self.x_proj(x).split_with_sizes(self.widths, -1)
        if self.normed:
            selected = [getattr(self, name)(y) for name, y in zip(self.normed, selected, strict=True)]
        dt, B, C = selected
        dt = F.softplus(cast(self.dt_proj(dt), self.dt_bias.dtype) + self.dt_bias)
        A = -self.A_log.exp()
        before = None if state is None else state.s[:, 0]  # (n, d, k)
        y, h = selective_scan(x, dt, A, B, C, state=before, rows=context.rows, packing=context.packing)
        y = torch.addcmul(y, x, cast(self.D, x.dtype)) * F.silu(z)
        return y, recurrent(None if h is None else h[:, None], conv)
