"""The gated linear attention layer."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import GLA
from plait.design.model import ModelConfig
from plait.design.norms import inner
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.norm import GatedNorm
from plait.layers.rope import turn_both
from plait.ops.gla import gla
from plait.ops.kernels import Call, wide
from plait.ops.parts import parts
from plait.state import Recurrent


class GLALayer(MixerModule):
    """arXiv 2312.06635, section 4.4. `in_proj` holds the rows of q, k, v, z and of what `decay_proj` reads."""

    config: GLA
    in_proj: nn.Linear
    decay_proj: nn.Linear
    norm: GatedNorm

    @classmethod
    def ops(cls, config: GLA, call: Call) -> list[tuple[str, None]]:
        return [("gla", None)]

    def assemble(self, design: ModelConfig) -> None:
        # queries are scaled by 1/sqrt(k); here outputs stay that much larger, and the bound inside the norm grows with them
        c = self.config
        self.norm = GatedNorm(c.value_head_dim, inner(design.norm).eps * c.head_dim)

    def inner(
        self, x: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        c = self.config
        *qkvz, low = parts(self.in_proj(x), [*c.rows().values()])
        q, k, v, z = (y.unflatten(-1, (c.heads, -1)) for y in qkvz)  # (b, t, h, k | v)
        q, k = turn_both(q, k, c.rope, context)
        g = F.logsigmoid(wide(self.decay_proj(low))) / c.temper
        g = g.unflatten(-1, (c.heads, -1))
        o, s = gla(q, k, v, g, state=state and state.s, rows=context.rows, packing=context.packing)
        return self.norm(o, z).flatten(2), None if s is None or state is None else Recurrent(s, state.conv)
