"""The gated DeltaNet layer."""

from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import GatedDeltaNet
from plait.design.model import ModelConfig
from plait.design.norms import inner
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.norm import GatedNorm
from plait.layers.rope import turn
from plait.layers.short_conv import ShortConv
from plait.ops.delta import Gates, gated_delta
from plait.ops.kernels import Call
from plait.ops.parts import parts
from plait.state import Recurrent, recurrent


class GatedDeltaNetLayer(MixerModule):
    """arXiv 2412.06464 as in Qwen3-Next. `in_proj` holds the rows of q, k, v, z, b and a, heads in order."""

    config: GatedDeltaNet
    in_proj: nn.Linear
    conv1d: ShortConv
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    norm: GatedNorm

    @classmethod
    def ops(cls, config: GatedDeltaNet, call: Call) -> list[tuple[str, None]]:
        return [("conv", None), ("delta", None)]

    def __init__(self, config: GatedDeltaNet, design: ModelConfig):
        super().__init__(config, design)
        q, k, v, z, b, a = config.rows().values()
        self.widths, self.conv_widths = [q + k + v, z, b, a], [q + k, v]

    def assemble(self, design: ModelConfig) -> None:
        # queries are scaled by 1/sqrt(k); here outputs stay that much larger, and the bound inside the norm grows with them
        c = self.config
        self.norm = GatedNorm(c.value_head_dim, (c.norm_eps or inner(design.norm).eps) * c.head_dim)

    def inner(
        self, x: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        c, (b, t, _) = self.config, x.shape
        qkv, z, beta, a = parts(self.in_proj(x), self.widths)
        qkv, conv = self.conv1d(qkv, context, state and state.conv)
        qk, v = qkv.split_with_sizes(self.conv_widths, -1)
        qk = qk.view(b, t, -1, c.head_dim)
        q, k = (qk if c.rope is None else turn(qk, c.rope, context)).unflatten(2, (2, -1)).unbind(2)
        v, z = v.view(b, t, -1, c.value_head_dim), z.view(b, t, -1, c.value_head_dim)
        gates = Gates(self.A_log, self.dt_bias, most=2.0 if c.negative_eigenvalues else 1.0)
        o, s = gated_delta(
            q, k, v, a, beta, gates=gates, state=state and state.s, rows=context.rows, packing=context.packing
        )
        return self.norm(o, z).flatten(2), recurrent(s, conv)
