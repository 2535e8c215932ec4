"""The solvers as torch operators, so that a compiled graph holds each call as one step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from plait.ops.graph import gradient
from plait.ops.kernels import cast
from plait.ops.operator import operator
from plait.ops.packing import Packing, known
from plait.ops.shooting import chunked, torch_rnn
from plait.ops.shooting.cells import KNOWN, Bound


def _bound(name: str, tensors: Sequence[Tensor], bias: bool) -> Bound:
    return Bound(KNOWN[name], tensors[0], tensors[1] if bias else None, tuple(tensors[1 + bias :]))


def _documents(cu_seqlens: Tensor | None, x: Tensor) -> Packing | None:
    return None if cu_seqlens is None else known(cu_seqlens, x.device)


@operator("shooting")
def solve(
    x: Tensor,
    h0: Tensor | None,
    tensors: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    cell: str,
    bias: bool,
    kernel: str,
    solver: str,
    tol: float,
    max_passes: int | None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h (b, t, h, k) in x's dtype, the other states (b, t, s - 1, h, k), the last states (n, s, h, k), nothing in them where
    no first ones are given, (passes, gap, fell back), and the states (b, m, s, h, k) after tokens `at`, if asked for."""
    bound, packing = _bound(cell, tensors, bias), _documents(cu_seqlens, x)
    first = start(bound, x, packing) if h0 is None else h0
    h, rest, final, info = _solve(bound, x, first, packing, kernel, solver, tol, max_passes, at is not None)
    states = final.new_empty(0) if at is None else torch.cat([h[:, at, None], rest[:, at]], 2)
    last = final.new_empty(0, *final.shape[1:]) if h0 is None else final.contiguous()
    return h.to(x.dtype).contiguous(), rest.contiguous(), last, info, states


def start(cell: Bound, x: Tensor, packing: Packing | None) -> Tensor:
    """The states before the first token of every sequence, which are the cell's own (n, s, h, k)."""
    return cell.cell.start_like(x, len(x) if packing is None else packing.count, _wide(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _solve(
    bound: Bound,
    x: Tensor,
    h0: Tensor,
    packing: Packing | None,
    kernel: str,
    solver: str,
    tol: float,
    max_passes: int | None,
    with_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if kernel == "triton":
        from plait.ops.shooting import triton

        return triton.forward(bound, x, h0, packing, tol, max_passes or triton.passes(tol))
    engine, bound = _engine(kernel), bound.to(h0.dtype)
    tokens = x.to(h0.dtype) if engine is chunked.TORCH else x
    in_turn = solver == "sequential"
    h, rest, final, record = chunked.forward(bound, tokens, h0, packing, tol, max_passes, engine, one_chunk=in_turn)
    info = torch.tensor([record.passes, record.gap, record.fell_back], dtype=torch.float32, device=x.device)
    if record.fell_back and torch_rnn.supports(bound) and not with_states:
        h, final = torch_rnn.run(bound, tokens, h0, packing)  # `rest` is wrong then, and nobody reads it
    elif record.fell_back:
        h, rest, final, _ = chunked.forward(bound, tokens, h0, packing, tol, max_passes, engine, one_chunk=True)
    return h, rest, final, info


def _engine(kernel: str) -> chunked.Engine:
    if kernel == "chunked":
        return chunked.TORCH
    from plait.ops.shooting.triton.matrices import MATRICES

    return MATRICES


@torch.library.register_fake("plait::shooting")
def _(x, h0, tensors, cu_seqlens, cell, bias, kernel, solver, tol, max_passes, at=None):
    (b, t, _, h, k), states = x.shape, len(KNOWN[cell].states)
    return (
        x.new_empty(b, t, h, k),
        x.new_empty(b, t, states - 1, h, k, dtype=_wide(x)),
        x.new_empty(0, states, h, k, dtype=_wide(x)) if h0 is None else h0.new_empty(h0.shape),
        x.new_empty(3, dtype=torch.float32),
        x.new_empty(0 if at is None else (b, at.shape[0], states, h, k), dtype=_wide(x)),
    )


@operator("shooting_backward")
def pull(
    grad: Tensor | None,
    grad_final: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    h: Tensor,
    rest: Tensor,
    info: Tensor,
    tensors: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    cell: str,
    bias: bool,
    kernel: str,
    tol: float,
    max_passes: int | None,
) -> list[Tensor]:
    """Gradients at x, h0 (nothing in it where that was not given) and each of `tensors`, in their dtypes."""
    bound, packing = _bound(cell, tensors, bias), _documents(cu_seqlens, x)
    given, h0 = h0, start(bound, x, packing) if h0 is None else h0
    if kernel == "triton":
        from plait.ops.shooting import triton

        dx, dh0, weights = triton.backward(bound, x, h0, h, rest, grad, grad_final, packing)
    else:
        engine, bound = _engine(kernel), bound.to(h0.dtype)
        tokens = x.to(h0.dtype) if engine is chunked.TORCH else x
        fell_back = bool(info[2] > 0)
        if fell_back and torch_rnn.supports(bound):
            dx, dh0, *weights = torch_rnn.backward(bound, tokens, h0, grad, grad_final, packing)
        else:
            states = torch.cat([h.to(h0.dtype)[:, :, None], rest], 2)
            g = torch.zeros_like(states[:, :, 0]) if grad is None else grad.to(h0.dtype)
            dx, dh0, *weights = chunked.backward(
                bound, tokens, h0, states, g, grad_final, packing, tol, max_passes, engine, one_chunk=fell_back
            )
    dh0 = dh0.new_empty(0) if given is None else dh0.contiguous()
    return [_laid_out(dx, x), dh0, *(cast(dw, w.dtype) for dw, w in zip(weights, tensors, strict=True))]


def _laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """In the dtype and layout that the compiler was promised: x may be a transposed view."""
    out = torch.empty_like(like)
    same = gradient.dtype == out.dtype and gradient.stride() == out.stride()
    return gradient if same else out.copy_(gradient)


@torch.library.register_fake("plait::shooting_backward")
def _(grad, grad_final, x, h0, h, rest, info, tensors, cu_seqlens, cell, bias, kernel, tol, max_passes):
    dh0 = x.new_empty(0, dtype=_wide(x)) if h0 is None else h0.new_empty(h0.shape)
    return [torch.empty_like(x), dh0, *(torch.empty_like(w) for w in tensors)]


class Solve(torch.autograd.Function):
    """The operators as one differentiable step: h, the last states and the record. Much less work for the host than
    `torch.library.register_autograd`, which counts where a call takes a fraction of a millisecond."""

    @staticmethod
    def forward(
        ctx, options: tuple, cu_seqlens: Tensor | None, x: Tensor, h0: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, rest, final, info, _ = solve(x, h0, tensors, cu_seqlens, *options)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(info)
        ctx.save_for_backward(cu_seqlens, x, h0, h, rest, info, *tensors)
        ctx.options = options
        return h, final, info

    @staticmethod
    @gradient
    def backward(ctx, grad, grad_final, _info):  # pyright: ignore[reportIncompatibleMethodOverride]
        cu_seqlens, x, h0, h, rest, info, *tensors = ctx.saved_tensors
        grad_final = None if h0 is None else grad_final
        if grad is None and grad_final is None:
            return (None,) * (4 + len(tensors))
        cell, bias, kernel, _, tol, max_passes = ctx.options
        dx, dh0, *rest = pull(
            grad, grad_final, x, h0, h, rest, info, tensors, cu_seqlens, cell, bias, kernel, tol, max_passes
        )
        return None, None, dx, None if h0 is None else dh0, *rest
