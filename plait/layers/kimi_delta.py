"""The Kimi delta attention layer."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import KimiDeltaAttention
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm, inner
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.norm import Norm
from plait.layers.rope import turn_both
from plait.layers.short_conv import ShortConv
from plait.ops.delta import Gates, gated_delta
from plait.ops.kernels import Call
from plait.ops.parts import parts
from plait.state import Recurrent, recurrent


class KimiDeltaAttentionLayer(MixerModule):
    """arXiv 2510.26692, section 4. `in_proj` holds the rows of q, k, v, of what `decay_proj` and `gate_proj` read, and of b."""

    config: KimiDeltaAttention
    in_proj: nn.Linear
    conv1d: ShortConv
    decay_proj: nn.Linear
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    gate_proj: nn.Linear
    norm: Norm

    @classmethod
    def ops(cls, config: KimiDeltaAttention, call: Call) -> list[tuple[str, None]]:
        return [("conv", None), ("gla", None)]

    def __init__(self, config: KimiDeltaAttention, design: ModelConfig):
        super().__init__(config, design)
        q, k, v, decay, z, b = config.rows().values()
        self.widths, self.conv_widths = [q + k + v, decay, z, b], [q, k, v]

    def assemble(self, design: ModelConfig) -> None:
        # queries are scaled by 1/sqrt(k); here outputs stay that much larger, and the bound inside the norm grows with them
        c = self.config
        self.norm = Norm(c.value_head_dim, RMSNorm(eps=inner(design.norm).eps * c.head_dim))

    def inner(
        self, x: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        c = self.config
        qkv, decay, z, b = parts(self.in_proj(x), self.widths)
        qkv, conv = self.conv1d(qkv, context, state and state.conv)
        q, k, v = (y.unflatten(-1, (c.heads, -1)) for y in qkv.split_with_sizes(self.conv_widths, -1))
        q, k = turn_both(q, k, c.rope, context)
        a = self.decay_proj(decay).unflatten(-1, (c.heads, -1))  # (b, t, h, k)
        gates = Gates(self.A_log, self.dt_bias.view(c.heads, -1), most=2.0 if c.negative_eigenvalues else 1.0)
        o, s = gated_delta(
            q, k, v, a, b, gates=gates, state=state and state.s, rows=context.rows, packing=context.packing
        )
        return self.norm(o).flatten(2) * torch.sigmoid(self.gate_proj(z)), recurrent(s, conv)
