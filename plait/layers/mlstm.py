"""The mLSTM layer."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import MLSTM
from plait.design.model import ModelConfig
from plait.design.norms import inner
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.norm import HeadNorm
from plait.ops.kernels import Call, cast
from plait.ops.mlstm import mlstm
from plait.ops.parts import parts
from plait.state import Recurrent


class MLSTMLayer(MixerModule):
    """arXiv 2405.04517 as in xLSTM-7B. `in_proj` holds the rows of q, k, v and the output gate, `gates_proj` those of the input
    and forget gates, heads in order."""

    config: MLSTM
    in_proj: nn.Linear
    gates_proj: nn.Linear
    i_bias: nn.Parameter
    f_bias: nn.Parameter
    norm: HeadNorm

    @classmethod
    def ops(cls, config: MLSTM, call: Call) -> list[tuple[str, None]]:
        return [("mlstm", None)]

    def assemble(self, design: ModelConfig) -> None:
        c = self.config
        self.norm = HeadNorm(c.heads, c.head_dim, inner(design.norm).eps)

    def inner(
        self, x: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t w"], Recurrent | None]:
        c = self.config
        q, k, v, gate = parts(self.in_proj(x), [*c.rows().values()])
        q, k, v = (y.unflatten(-1, (c.heads, -1)) for y in (q, k, v))
        i, f = self.gates_proj(x).chunk(2, -1)
        i, f = self.capped(i, self.i_bias), self.capped(f, self.f_bias)
        kept = {"state": state and state.s, "rows": context.rows, "packing": context.packing}
        h, s, *_ = mlstm(q, k, v, i, f, scale=c.key_dim**-0.5, **kept)
        h = self.norm(h).flatten(2) * torch.sigmoid(gate)
        return h, None if state is None or s is None else Recurrent(s, state.conv)

    def capped(self, x: Float[Tensor, "b t h"], bias: Float[Tensor, " h"]) -> Float[Tensor, "b t h"]:
        """In the bias's dtype, float32 at least."""
        return self.config.cap * torch.tanh((cast(x, bias.dtype) + bias) / self.config.cap)
