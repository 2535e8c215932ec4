"""The nonlinearities of SwiGLU and GEGLU (arXiv 2002.05202): silu(gate) up and gelu(gate) up, with a gradient that keeps
no more than the input."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plait.ops.graph import gradient, one_step
from plait.ops.operator import operator
from plait.ops.token import few_rows


def swiglu(hidden: Float[Tensor, "*n 2*h"]) -> Float[Tensor, "*n h"]:
    """silu(gate) up, where gate and up are the halves of the last axis."""
    if torch.is_grad_enabled():
        return _swiglu(hidden)
    if hidden.is_cuda and few_rows(hidden, widest=2**17):
        return _rows(hidden)
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate).mul_(up)


def geglu(hidden: Float[Tensor, "*n 2*h"]) -> Float[Tensor, "*n h"]:
    """gelu(gate) up in its tanh form, where gate and up are the halves of the last axis."""
    if torch.is_grad_enabled():
        return _geglu(hidden)
    gate, up = hidden.chunk(2, -1)
    return _gelu(gate).mul_(up)


def _gelu(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


def _gelu_backward(dy: Tensor, gate: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, gate, approximate="tanh")


def _gated(
    act: Callable[[Tensor], Tensor], act_backward: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """act(gate) up as one step of a graph."""

    class Gated(torch.autograd.Function):
        """Keeps only its input, and writes both halves of the gradient into one tensor; autograd would keep four and join
        two."""

        @staticmethod
        def forward(ctx, hidden: Tensor) -> Tensor:
            ctx.save_for_backward(hidden)
            gate, up = hidden.chunk(2, -1)
            return act(gate).mul_(up)

        @staticmethod
        @gradient
        def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
            (hidden,) = ctx.saved_tensors
            gate, up = hidden.chunk(2, -1)
            dhidden = torch.empty_like(hidden)
            dgate, dup = dhidden.chunk(2, -1)
            dup.copy_(act(gate)).mul_(dy)
            dgate.copy_(act_backward(dy * up, gate))
            return dhidden

    return one_step(Gated)


_swiglu = _gated(F.silu, torch.ops.aten.silu_backward)
_geglu = _gated(_gelu, _gelu_backward)


@operator("swiglu")
def _rows(hidden: Tensor) -> Tensor:
    from plait.ops import elementwise_triton

    out = hidden.new_empty(*hidden.shape[:-1], hidden.shape[-1] // 2)
    rows = hidden.reshape(-1, hidden.shape[-1])
    elementwise_triton.swiglu(rows, out.view(len(rows), -1))
    return out


@torch.library.register_fake("plait::swiglu")
def _(hidden):
    return hidden.new_empty(*hidden.shape[:-1], hidden.shape[-1] // 2)
