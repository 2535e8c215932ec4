"""Linear attention whose heads forget at one rate each: retention, lightning attention, simple GLA."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import LightningAttention, RetNet, ScalarDecay, SimpleGLA
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm, inner
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.norm import GatedNorm, Norm
from plait.layers.rope import turn_both
from plait.ops.kernels import Call, cast
from plait.ops.parts import parts
from plait.ops.ssd import ssd
from plait.state import Recurrent


class ScalarDecayLayer(MixerModule):
    """`in_proj` holds the rows of q, k, v and the gate, heads in order; of simple GLA those of g come last."""

    config: ScalarDecay
    in_proj: nn.Linear
    norm: nn.Module

    @classmethod
    def ops(cls, config: ScalarDecay, call: Call) -> list[tuple[str, None]]:
        return [("ssd", None)]

    def assemble(self, design: ModelConfig) -> None:
        self.norm = GatedNorm(self.config.value_head_dim, inner(design.norm).eps)

    def inner(
        self, x: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t w"], Recurrent | None]:
        c = self.config
        q, k, v, gate, *rest = parts(self.in_proj(x), [*c.rows().values()])
        q, k, v = self.prepared(*(y.unflatten(-1, (c.heads, -1)) for y in (q, k, v)), context)
        g = self.decays(x, *rest)
        kept = {"state": state and state.s, "rows": context.rows, "packing": context.packing}
        o, s, *_ = ssd(q, k, v, g, scale=self.scale, **kept)
        return self.gated(o, gate), None if state is None or s is None else Recurrent(s, state.conv)

    @property
    def scale(self) -> float | None:
        return self.config.head_dim**-0.5

    def prepared(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        return *turn_both(q, k, self.config.rope, context), v

    def decays(self, x: Tensor, *rest: Tensor) -> Float[Tensor, "b t h"]:
        """The logs, float32 at least."""
        raise NotImplementedError(f"{type(self).__name__} has no decays(self, x, *rest)")

    def gated(self, o: Float[Tensor, "b t h v"], gate: Float[Tensor, "b t w"]) -> Float[Tensor, "b t w"]:
        return self.norm(o, gate.view(o.shape)).flatten(2)


class FixedDecayLayer(ScalarDecayLayer):
    """Decays that are the same for all tokens."""

    def decays(self, x: Tensor, *rest: Tensor) -> Float[Tensor, "b t h"]:
        head = torch.arange(self.config.heads, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return self.logs(head).expand(*x.shape[:2], -1)

    def logs(self, head: Float[Tensor, " h"]) -> Float[Tensor, " h"]:
        """Of heads by number, from 0."""
        raise NotImplementedError(f"{type(self).__name__} has no logs(self, head)")


class RetNetLayer(FixedDecayLayer):
    """arXiv 2307.08621, equations 7 and 8."""

    config: RetNet

    def logs(self, head: Float[Tensor, " h"]) -> Float[Tensor, " h"]:
        return torch.log1p(-(2.0 ** (-5 - head)))


class LightningAttentionLayer(FixedDecayLayer):
    """arXiv 2501.08313, section 2.2."""

    config: LightningAttention
    norm: Norm

    def assemble(self, design: ModelConfig) -> None:
        self.norm = Norm(self.config.inner(), RMSNorm(eps=self.config.norm_eps or inner(design.norm).eps))

    @property
    def scale(self) -> float | None:
        return None

    def prepared(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        return super().prepared(F.silu(q), F.silu(k), F.silu(v), context)

    def logs(self, head: Float[Tensor, " h"]) -> Float[Tensor, " h"]:
        return -self.config.slope * 2.0 ** (-8 * (head + 1) / len(head))

    def gated(self, o: Float[Tensor, "b t h v"], gate: Float[Tensor, "b t w"]) -> Float[Tensor, "b t w"]:
        return self.norm(o.flatten(2)) * torch.sigmoid(gate)


class SimpleGLALayer(ScalarDecayLayer):
    """arXiv 2312.06635, section 4, with one gate a head."""

    config: SimpleGLA
    g_bias: nn.Parameter

    def decays(self, x: Tensor, *rest: Tensor) -> Float[Tensor, "b t h"]:
        return F.logsigmoid(cast(rest[0], self.g_bias.dtype) + self.g_bias) / self.config.temper
