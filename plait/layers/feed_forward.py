"""Channel mixers: two projections with a nonlinearity between, token by token."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import GELU, FeedForward, ReLU2, SwiGLU
from plait.design.model import ModelConfig
from plait.layers.context import Context
from plait.layers.declared import LayerModule
from plait.ops.graph import gradient, one_step
from plait.state import Nothing


def swiglu(hidden: Float[Tensor, "b t 2*h"]) -> Float[Tensor, "b t h"]:
    return _swiglu(hidden) if torch.is_grad_enabled() else _silu_times(*hidden.chunk(2, -1))


def _silu_times(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    """Keeps only its input, and writes both halves of the gradient into one tensor; autograd would keep four and join two."""

    @staticmethod
    def forward(ctx, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return _silu_times(*hidden.chunk(2, -1))

    @staticmethod
    @gradient
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (hidden,) = ctx.saved_tensors
        gate, up = hidden.chunk(2, -1)
        dhidden = torch.empty_like(hidden)
        dgate, dup = dhidden.chunk(2, -1)
        dup.copy_(F.silu(gate)).mul_(dy)
        dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
        return dhidden


def gelu(hidden: Tensor) -> Tensor:
    return F.gelu(hidden, approximate="tanh")


def relu2(hidden: Tensor) -> Tensor:
    return torch.relu(hidden).square()


ACTIVATIONS = {SwiGLU: swiglu, GELU: gelu, ReLU2: relu2}


_swiglu = one_step(_SwiGLU)


class FeedForwardLayer(LayerModule):
    """down(act(up x)); in a SwiGLU `up_proj` holds the rows of gate and up."""

    config: FeedForward
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, config: FeedForward, design: ModelConfig):
        super().__init__(config, design)
        self.act = ACTIVATIONS[type(config)]

    def forward(
        self, x: Float[Tensor, "b t d"], context: Context, state: Nothing | None
    ) -> tuple[Float[Tensor, "b t d"], Nothing | None]:
        return self.down_proj(self.act(self.up_proj(x))), state
