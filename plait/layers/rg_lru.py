"""The recurrent block of Griffin."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import RGLRU
from plait.design.model import ModelConfig
from plait.layers.context import Context
from plait.layers.declared import HeadProjection, MixerModule
from plait.layers.short_conv import ShortConv
from plait.ops.kernels import Call, cast
from plait.ops.scan import scan
from plait.ops.scan.rg_lru import rg_lru_gates
from plait.state import Recurrent, recurrent


class RGLRULayer(MixerModule):
    """arXiv 2402.19427, section 2.4. `in_proj` holds the rows of x and of the gate; `gates`, head by head, those of the input
    gate and of the recurrence gate."""

    config: RGLRU
    in_proj: nn.Linear
    conv1d: ShortConv
    gates: HeadProjection
    Lambda: nn.Parameter

    @classmethod
    def ops(cls, config: RGLRU, call: Call) -> list[tuple[str, None]]:
        return [("conv", None), ("scan", None)]

    def assemble(self, design: ModelConfig) -> None:
        weight, bias = self.config.convolution()
        self.conv1d = ShortConv(weight, bias, silu=False)

    def inner(
        self, u: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        x, gate = self.in_proj(u).chunk(2, -1)
        x, conv = self.conv1d(x, context, state and state.conv)
        a, b = self._gated(x, context)
        y, s = scan(a, b, state=state and state.s, rows=context.rows, packing=context.packing)
        return cast(y.flatten(2), gate.dtype) * F.gelu(gate, approximate="tanh"), recurrent(s, conv)

    def _gated(
        self, x: Float[Tensor, "b t d"], context: Context
    ) -> tuple[Float[Tensor, "b t 1 h k"], Float[Tensor, "b t 1 h k"]]:
        write, forget = self.gates(x, 2).split(1, 2)  # (b, t, 1, h, k)
        first = (context.positions == 0)[..., None, None, None]
        return rg_lru_gates(x.unflatten(-1, write.shape[2:]), write, forget, self.Lambda, first)
