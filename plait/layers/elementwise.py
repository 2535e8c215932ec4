"""Layers of elementwise recurrences whose gates see the input alone: HGRN, minGRU, minLSTM."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers.elementwise import HGRN, ElementwiseRecurrence
from plait.design.model import ModelConfig
from plait.design.norms import inner
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.norm import GatedNorm
from plait.layers.short_conv import ShortConv
from plait.ops.kernels import Call, cast, wide
from plait.ops.scan import scan
from plait.state import Recurrent, recurrent


class ElementwiseLayer(MixerModule):
    """h = a h + b between an optional convolution and a gated norm; each kind has its `gates`."""

    config: ElementwiseRecurrence
    in_proj: nn.Linear
    gate_proj: nn.Linear
    conv1d: ShortConv | None
    norm: GatedNorm

    @classmethod
    def ops(cls, config: ElementwiseRecurrence, call: Call) -> list[tuple[str, None]]:
        return [*([("conv", None)] if config.conv_width else []), ("scan", None)]

    def __init__(self, config: ElementwiseRecurrence, design: ModelConfig):
        super().__init__(config, design)
        if not config.conv_width:
            self.conv1d = None

    def assemble(self, design: ModelConfig) -> None:
        self.norm = GatedNorm(self.config.width, inner(design.norm).eps)

    def gates(self, *projected: Float[Tensor, "b t d"]) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t d"]]:
        """a and b, from what is `projected`, at least float32."""
        raise NotImplementedError(f"{type(self).__name__} has no gates(self, *projected)")

    def inner(
        self, x: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        u, conv = x, state and state.conv
        if self.conv1d is not None:
            u, conv = self.conv1d(x, context, conv)
        projected = self.in_proj(u)
        a, b = self.gates(*wide(projected).split(self.config.width, -1))
        a, b = (y[:, :, None, None] for y in (a, b))  # as the state has it
        h, s = scan(a, b, state=state and state.s, rows=context.rows, packing=context.packing)
        return self.norm(cast(h.flatten(2), projected.dtype), self.gate_proj(x)), recurrent(s, conv)


class MinGRULayer(ElementwiseLayer):
    """arXiv 2410.01201, section 3.1."""

    def gates(self, *projected: Tensor) -> tuple[Tensor, Tensor]:
        z, c = projected
        return torch.sigmoid(-z), torch.sigmoid(z) * c


class MinLSTMLayer(ElementwiseLayer):
    """arXiv 2410.01201, section 3.2. f / (f + i) is a sigmoid of log f - log i, so that nothing is divided by gates near 0."""

    def gates(self, *projected: Tensor) -> tuple[Tensor, Tensor]:
        f, i, c = projected
        kept = F.softplus(-i) - F.softplus(-f)
        return torch.sigmoid(kept), torch.sigmoid(-kept) * c


class HGRNLayer(ElementwiseLayer):
    """arXiv 2311.04823, section 3, without complex phases."""

    gamma: nn.Parameter | None

    def __init__(self, config: HGRN, design: ModelConfig):
        super().__init__(config, design)
        if config.lower_bound is None:
            self.gamma = None

    def gates(self, *projected: Tensor) -> tuple[Tensor, Tensor]:
        f, c = projected
        forgotten = torch.sigmoid(-f)
        if self.gamma is not None:
            forgotten = forgotten * torch.sigmoid(-self.gamma)
        return 1 - forgotten, forgotten * F.silu(c)
