"""The Mamba-2 layer."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import Mamba2
from plait.design.model import ModelConfig
from plait.design.norms import inner
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.norm import GatedNorm
from plait.layers.short_conv import ShortConv
from plait.ops.kernels import Call
from plait.ops.parts import parts
from plait.ops.ssd import Gates, ssd
from plait.state import Recurrent, recurrent


class Mamba2Layer(MixerModule):
    """arXiv 2405.21060, section 7. `in_proj` holds the rows of z, x, B, C and dt, as in the published checkpoints."""

    config: Mamba2
    in_proj: nn.Linear
    conv1d: ShortConv
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    D: nn.Parameter
    norm: GatedNorm | None

    @classmethod
    def ops(cls, config: Mamba2, call: Call) -> list[tuple[str, None]]:
        return [("conv", None), ("ssd", None)]

    def __init__(self, config: Mamba2, design: ModelConfig):
        super().__init__(config, design)
        z, x, B, C, dt = config.rows().values()
        self.widths, self.conv_widths = [z, x + B + C, dt], [x, B, C]

    def assemble(self, design: ModelConfig) -> None:
        c = self.config
        self.norm = None
        if c.output_norm != "none":
            first = c.output_norm == "gate_first"
            self.norm = GatedNorm(c.inner(), inner(design.norm).eps, groups=c.groups, gate_first=first)

    def inner(
        self, u: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        c, (b, t, _) = self.config, u.shape
        z, xBC, dt = parts(self.projected(u), self.widths)
        xBC, conv = self.conv1d(xBC, context, state and state.conv)
        x, B, C = xBC.split_with_sizes(self.conv_widths, -1)
        x = x.view(b, t, -1, c.head_dim)
        B, C = B.view(b, t, c.groups, -1), C.view(b, t, c.groups, -1)
        gates = Gates(self.A_log, self.dt_bias, self.D, c.dt_min, c.dt_max)
        y, s = ssd(C, B, x, dt, gates=gates, state=state and state.s, rows=context.rows, packing=context.packing)
        y = y.flatten(2)
        return (y * F.silu(z) if self.norm is None else self.norm(y, z)), recurrent(s, conv)

    def projected(self, u: Float[Tensor, "b t d"]) -> Float[Tensor, "b t r"]:
        """z, x, B, C and dt, each times its multiplier where there are some."""
        y, c = self.in_proj(u), self.config
        if c.multipliers is None:
            return y
        return y * torch.cat([y.new_full((n,), by) for n, by in zip(c.rows().values(), c.multipliers, strict=True)])
