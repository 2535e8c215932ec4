"""Channel mixers: two projections with a nonlinearity between, token by token."""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import GEGLU, GELU, FeedForward, ReLU2, SwiGLU
from plait.design.layers.feed_forward import Gated
from plait.design.model import ModelConfig
from plait.layers.context import Context
from plait.layers.declared import LayerModule
from plait.ops.swiglu import geglu, swiglu
from plait.state import Nothing


def gelu(hidden: Tensor) -> Tensor:
    return F.gelu(hidden, approximate="tanh")


def relu2(hidden: Tensor) -> Tensor:
    return torch.relu(hidden).square()


ACTIVATIONS = {SwiGLU: swiglu, GEGLU: geglu, GELU: gelu, ReLU2: relu2}


class FeedForwardLayer(LayerModule):
    """down(act(up x)); with a gate `up_proj` holds the rows of gate and up."""

    config: FeedForward
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, config: FeedForward, design: ModelConfig):
        super().__init__(config, design)
        self.act = (
            partial(geglu, exact=True) if isinstance(config, GEGLU) and config.exact else ACTIVATIONS[type(config)]
        )
        self.gate_scale = config.gate_scale if isinstance(config, Gated) else 1.0

    def forward(
        self, x: Float[Tensor, "b t d"], context: Context, state: Nothing | None
    ) -> tuple[Float[Tensor, "b t d"], Nothing | None]:
        hidden = self.up_proj(x)
        if self.gate_scale != 1:
            width = self.config.hidden
            hidden = hidden * torch.cat([hidden.new_full((width,), self.gate_scale), hidden.new_ones(width)])
        return self.down_proj(self.act(hidden)), state
