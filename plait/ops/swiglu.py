"""The nonlinearities of SwiGLU and GEGLU (arXiv 2002.05202): silu(gate) up and gelu(gate) up, with a gradient that keeps
no more than the input."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plait.ops.graph import gradient, one_step
from plait.ops.operator import operator
from plait.ops.token import few_rows

aten: Any = torch.ops.aten

EXACT = "none"  # gelu's other form is an approximation


def swiglu(hidden: Float[Tensor, "*n 2*h"]) -> Float[Tensor, "*n h"]:
    """silu(gate) up, where gate and up are the halves of the last axis."""
    if torch.is_grad_enabled():
        return _swiglu(hidden)
    if hidden.is_cuda and few_rows(hidden, widest=2**17):
        return _rows(hidden)
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate).mul_(up)


def geglu(hidden: Float[Tensor, "*n 2*h"], exact: bool = False) -> Float[Tensor, "*n h"]:
    """gelu(gate) up, gelu in its tanh form unless `exact`, where gate and up are the halves of the last axis."""
    if torch.is_grad_enabled():
        return _exact_geglu(hidden) if exact else _geglu(hidden)
    gate, up = hidden.chunk(2, -1)
    return _gelu(gate, form=EXACT if exact else "tanh").mul_(up)


def _silu(gate: Tensor, out: Tensor | None = None) -> Tensor:
    return F.silu(gate) if out is None else aten.silu.out(gate, out=out)


def _silu_backward(dy: Tensor, gate: Tensor, out: Tensor | None = None) -> Tensor:
    return aten.silu_backward(dy, gate) if out is None else aten.silu_backward.grad_input(dy, gate, grad_input=out)


def _gelu(gate: Tensor, out: Tensor | None = None, form: str = "tanh") -> Tensor:
    return F.gelu(gate, approximate=form) if out is None else aten.gelu.out(gate, approximate=form, out=out)


def _gelu_backward(dy: Tensor, gate: Tensor, out: Tensor | None = None, form: str = "tanh") -> Tensor:
    backward, place = (aten.gelu_backward, {}) if out is None else (aten.gelu_backward.grad_input, {"grad_input": out})
    return backward(dy, gate, approximate=form, **place)


def _gated(
    act: Callable[..., Tensor], act_backward: Callable[..., Tensor], on_gpu: Callable[..., Tensor] | None = None
) -> Callable[[Tensor], Tensor]:
    """act(gate) up as one step of a graph. on_gpu: the gradient of (hidden, dy) as one operator, for up to float32."""

    class Gated(torch.autograd.Function):
        """Keeps only its input, and computes both halves of the gradient where they are to lie: autograd would keep four
        tensors and join two, and on a CPU fresh memory costs more than the arithmetic."""

        @staticmethod
        def forward(ctx, hidden: Tensor) -> Tensor:
            ctx.save_for_backward(hidden)
            gate, up = hidden.chunk(2, -1)
            return act(gate).mul_(up)

        @staticmethod
        @gradient
        def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
            (hidden,) = ctx.saved_tensors
            if on_gpu is not None and hidden.is_cuda and hidden.dtype != torch.float64:
                return on_gpu(hidden, dy)
            gate, up = hidden.chunk(2, -1)
            if torch.compiler.is_compiling():  # it makes one pass of this, and refuses to be told where
                return torch.cat([act_backward(dy * up, gate), act(gate) * dy], -1)
            dhidden = torch.empty_like(hidden)
            dgate, dup = dhidden.chunk(2, -1)
            act(gate, out=dup).mul_(dy)
            act_backward(dgate.copy_(dy).mul_(up), gate, out=dgate)
            return dhidden

    return one_step(Gated)


@operator("swiglu", cheap=True)
def _rows(hidden: Tensor) -> Tensor:
    from plait.ops import elementwise_triton

    out = hidden.new_empty(*hidden.shape[:-1], hidden.shape[-1] // 2)
    rows = hidden.reshape(-1, hidden.shape[-1])
    elementwise_triton.swiglu(rows, out.view(len(rows), -1))
    return out


@torch.library.register_fake("plait::swiglu")
def _(hidden):
    return hidden.new_empty(*hidden.shape[:-1], hidden.shape[-1] // 2)


@operator("swiglu_gradient")
def _gradient(hidden: Tensor, dy: Tensor) -> Tensor:
    """Compiled from formulas each half would be a kernel that reads all."""
    from plait.ops import elementwise_triton

    out = hidden.new_empty(hidden.shape)
    read, given, made = (x.reshape(-1, x.shape[-1]) for x in (hidden, dy, out))
    given = given if given.stride(1) == 1 else given.contiguous()  # of a plain sum it is one number, over and over
    elementwise_triton.swiglu_gradient(read, given, made)
    return out


@torch.library.register_fake("plait::swiglu_gradient")
def _(hidden, dy):
    return hidden.new_empty(hidden.shape)


_swiglu = _gated(_silu, _silu_backward, _gradient)
_geglu = _gated(_gelu, _gelu_backward)
_exact_geglu = _gated(partial(_gelu, form=EXACT), partial(_gelu_backward, form=EXACT))
