"""The selective scan over many tokens on a GPU: the kernels of `plait.ops.selective.triton` as torch operators, in float32."""

import torch
from torch import Tensor

from plait.ops.graph import gradient, one_step
from plait.ops.kernels import Call, needs_tokens
from plait.ops.operator import operator
from plait.ops.packing import Packing

WIDEST = 128  # states of a channel


def fits(call: Call) -> str | None:
    """None, or why the kernels do not fit."""
    if reason := needs_tokens(call):
        return reason
    if call.dtype == torch.float64:
        return "computes in float32, the inputs are float64"
    if call.at:
        return "gives no states after chosen tokens"
    if isinstance(call.sizes, int) and call.sizes > WIDEST:
        return f"{call.sizes} states of a channel are above {WIDEST}"
    return None


def run(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `selective_scan`."""
    if packing is not None and state is not None:  # steps of length 0 after a document's end leave its state alone
        y, last = run(*(A if z is A else packing.to_rows(z) for z in (x, dt, A, B, C)), state=state, packing=None)
        return packing.from_rows(y), last
    offsets = None if packing is None else packing.offsets
    y, last = _walk(dt, dt * x, B, C, A, state, offsets)
    return y, None if state is None else last


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dt, u, B, C, A, h, offsets):
        y, last, before = _forward(dt, u, B, C, A, h, offsets)
        ctx.save_for_backward(dt, u, B, C, A, offsets, before)
        ctx.has_state = h is not None
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @gradient
    def backward(ctx, dy, dlast):  # pyright: ignore[reportIncompatibleMethodOverride]
        dt, u, B, C, A, offsets, before = ctx.saved_tensors
        dy = torch.zeros_like(u) if dy is None else dy
        ddt, du, dB, dC, dA, dh = _backward(dy, dlast if ctx.has_state else None, dt, u, B, C, A, offsets, before)
        return ddt, du, dB, dC, dA, dh if ctx.has_state else None, None


_walk = one_step(_Walk)


@operator("selective_tokens")
def _forward(
    dt: Tensor, u: Tensor, B: Tensor, C: Tensor, A: Tensor, h: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, t, d), the last state (b, d, k), the states before segments (b, n, d, k)."""
    from plait.ops.selective import triton

    return triton.forward(dt, u, B, C, A, h, offsets)


@torch.library.register_fake("plait::selective_tokens")
def _(dt, u, B, C, A, h, offsets):
    from plait.ops.selective.triton import SEGMENT

    (b, t, d), k = dt.shape, A.shape[1]
    return dt.new_empty(b, t, d), dt.new_empty(b, d, k), dt.new_empty(b, -(-t // SEGMENT), d, k)


@operator("selective_tokens_backward")
def _backward(
    dy: Tensor,
    dlast: Tensor | None,
    dt: Tensor,
    u: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    offsets: Tensor | None,
    before: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients at dt, u, B, C, A and the first state."""
    from plait.ops.selective import triton

    return triton.backward(dy, dlast, dt, u, B, C, A, offsets, before)


@torch.library.register_fake("plait::selective_tokens_backward")
def _(dy, dlast, dt, u, B, C, A, offsets, before):
    return *(x.new_empty(x.shape) for x in (dt, u, B, C, A)), dt.new_empty(dt.shape[0], *A.shape)
