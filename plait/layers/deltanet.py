"""The DeltaNet layer."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import DeltaNet
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm, inner
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.norm import Norm
from plait.layers.rope import turn_both
from plait.layers.short_conv import ShortConv
from plait.ops.delta import gated_delta
from plait.ops.kernels import Call, wide
from plait.ops.parts import parts
from plait.ops.rms_norm import l2norm
from plait.state import Recurrent, recurrent


class DeltaNetLayer(MixerModule):
    """arXiv 2406.06484, section 3.3. `in_proj` holds the rows of q, k, v and b."""

    config: DeltaNet
    in_proj: nn.Linear
    conv1d: ShortConv
    norm: Norm

    @classmethod
    def ops(cls, config: DeltaNet, call: Call) -> list[tuple[str, None]]:
        return [("conv", None), ("delta", None)]

    def __init__(self, config: DeltaNet, design: ModelConfig):
        super().__init__(config, design)
        q, k, v, b = config.rows().values()
        self.widths, self.conv_widths = [q + k + v, b], [q, k, v]

    def assemble(self, design: ModelConfig) -> None:
        # queries are scaled by 1/sqrt(k); here outputs stay that much larger, and the bound inside the norm grows with them
        c = self.config
        self.norm = Norm(c.value_head_dim, RMSNorm(eps=inner(design.norm).eps * c.head_dim))

    def inner(
        self, x: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        c = self.config
        qkv, b = parts(self.in_proj(x), self.widths)
        qkv, conv = self.conv1d(qkv, context, state and state.conv)
        q, k, v = (y.unflatten(-1, (c.heads, -1)) for y in qkv.split_with_sizes(self.conv_widths, -1))
        q, k = turn_both(q, k, c.rope, context)
        beta = torch.sigmoid(wide(b)) * (2 if c.negative_eigenvalues else 1)
        o, s = gated_delta(
            l2norm(q), l2norm(k), v, torch.zeros_like(beta), beta,
            state=state and state.s, rows=context.rows, packing=context.packing,
        )  # fmt: skip
        return self.norm(o).flatten(2), recurrent(s, conv)
