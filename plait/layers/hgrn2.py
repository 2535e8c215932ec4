"""The HGRN-2 layer."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import HGRN2
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.norm import Norm
from plait.ops.gla import gla
from plait.ops.kernels import Call, wide
from plait.ops.parts import parts
from plait.state import Recurrent


class HGRN2Layer(MixerModule):
    """arXiv 2404.07904, section 3.2. `in_proj` holds the rows of q, f and i."""

    config: HGRN2
    in_proj: nn.Linear
    bound: nn.Parameter | None
    norm: Norm

    @classmethod
    def ops(cls, config: HGRN2, call: Call) -> list[tuple[str, None]]:
        return [("gla", None)]

    def __init__(self, config: HGRN2, design: ModelConfig):
        super().__init__(config, design)
        if config.lower_bound is not None:
            self.bound = None

    def norms(self, design: ModelConfig) -> RMSNorm:
        found, eps = super().norms(design), self.config.norm_eps
        return found if eps is None else found.replace(eps=eps)

    def inner(
        self, x: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        c = self.config
        q, f, i = parts(self.in_proj(x), [*c.rows().values()])
        g, k = self.gates(wide(f))
        q, k, g, i = (y.unflatten(-1, (c.heads, -1)) for y in (F.silu(q), k, g, i))  # (b, t, h, k | v)
        o, s = gla(q, k, i, g, state=state and state.s, rows=context.rows, packing=context.packing)
        return self.norm(o.flatten(2)), None if s is None or state is None else Recurrent(s, state.conv)

    def gates(self, f: Float[Tensor, "b t k"]) -> tuple[Float[Tensor, "b t k"], Float[Tensor, "b t k"]]:
        """log of bound + (1 - bound) sigmoid(f), and 1 - that, each from terms that lose nothing."""
        bound = self.config.lower_bound
        if self.bound is not None:
            low, rest = F.logsigmoid(self.bound), F.logsigmoid(-self.bound)
            return torch.logaddexp(low, rest + F.logsigmoid(f)), torch.sigmoid(-self.bound) * torch.sigmoid(-f)
        assert bound is not None  # or it is learned
        g = F.logsigmoid(f) + math.log1p(-bound)
        if bound:
            g = torch.logaddexp(
                f.new_full((), math.log(bound)), g
            )  # filled there: a captured step reads nothing of the host's
        return g, (1 - bound) * torch.sigmoid(-f)
