"""Chunked recurrences on a GPU as torch operators: with one decay a head the kernels of `plait.ops.chunks_triton`, with one a
key channel those of `plait.ops.channels_triton`.

bfloat16 or float16 in (with decays per channel float32 too), float32 states and sums. Rounded to what comes in is what products
are taken of: states, corrected values, the inverses of chunks; where decays are per channel, q and k times them. Kept for
gradients are the inputs, the inverses, the corrected values, and the state before each chunk.
"""

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from plait.ops.graph import gradient, one_step
from plait.ops.kernels import Call, needs_nvidia
from plait.ops.operator import evenly, operator
from plait.ops.packing import CHUNK, Packing, sent

DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 256


class Sizes(NamedTuple):
    """Of a head's keys and values."""

    keys: int
    values: int


def sizes_of(k: Tensor, v: Tensor) -> Sizes | None:
    """What the kernels ask about heads; elsewhere nobody asks."""
    return Sizes(k.shape[3], v.shape[3]) if k.is_cuda else None


def fits(call: Call) -> str | None:
    """None, or why the kernels do not fit."""
    if reason := needs_nvidia(call):
        return reason
    if call.dtype not in DTYPES:
        return f"computes in 16 bits, the inputs are {call.dtype}"
    if call.tokens == "one":
        return "only for several tokens"
    if call.at:
        return "gives no states after chosen tokens"
    if isinstance(call.sizes, Sizes) and max(call.sizes) > WIDEST:
        return f"heads of {max(call.sizes)} are above {WIDEST}"
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `ssd` and, with `beta`, in `gated_delta`; with a decay per channel, in `gla` and `gated_delta`."""
    dtype = v.dtype
    q, k, v = (evenly(x.to(dtype)) for x in (q, k, v))
    g, beta = evenly(g), None if beta is None else evenly(beta)
    cu_seqlens = None if packing is None else packing.cu_seqlens
    first = None if state is None else state.float().contiguous()
    learned = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, beta, state))
    o, last = _chunked(q, k, v, g, beta, first, cu_seqlens, scale, learned)
    return o, None if state is None else last.to(state.dtype)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, cu_seqlens, scale, learned):
        o, last, *saved = _forward(q, k, v, g, beta, state, cu_seqlens, scale, learned)
        ctx.save_for_backward(q, k, v, g, beta, cu_seqlens, *saved)
        ctx.scale, ctx.has_state = scale, state is not None
        ctx.set_materialize_grads(False)
        return o, last

    @staticmethod
    @gradient
    def backward(ctx, do, dlast):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, g, beta, cu_seqlens, *saved = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(v)
        dlast = dlast if ctx.has_state else None
        dq, dk, dv, dg, *more = _backward(q, k, v, g, beta, do, dlast, cu_seqlens, saved, ctx.scale, ctx.has_state)
        dbeta = None if beta is None else more[0]
        return dq, dk, dv, dg, dbeta, more[-1] if ctx.has_state else None, None, None, None


_chunked = one_step(_Chunked)


@operator("chunks")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    gradients: bool,
) -> list[Tensor]:
    """O, the last states, and what `_backward` needs: the state before each chunk, the inverses, the corrected values."""
    room = _room(q, k, v, beta, cu_seqlens, gradients)
    last = v.new_empty(
        _sequences(v, cu_seqlens) if state is not None else 0, *v.shape[2:], k.shape[3], dtype=torch.float32
    )
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _kernels(g).run_forward(q, k, v, g, beta, state, o, last, *room, _planned(cu_seqlens, v.device), scale)
    return [o, last, *(x if x is not None else v.new_empty(0) for x in room)]


@torch.library.register_fake("plait::chunks")
def _(q, k, v, g, beta, state, cu_seqlens, scale, gradients):
    rows = _sequences(v, cu_seqlens) if state is not None else 0
    last = v.new_empty(rows, *v.shape[2:], k.shape[3], dtype=torch.float32)
    room = _room(q, k, v, beta, cu_seqlens, gradients)
    return [v.new_empty(v.shape), last, *(x if x is not None else v.new_empty(0) for x in room)]


def _kernels(g: Tensor) -> ModuleType:
    from plait.ops import channels_triton, chunks_triton

    return channels_triton if g.ndim == 4 else chunks_triton


def _room(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, cu_seqlens: Tensor | None, gradients: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Memory for the state before each chunk (chunks, h, k, v), the inverses (chunks, h, c, c) and the corrected values."""
    (b, t, h, dv), dk = v.shape, k.shape[3]
    count = b * (-(-t // CHUNK)) if cu_seqlens is None else t // CHUNK + cu_seqlens.shape[0] + 1
    before = v.new_empty(count, h, dk, dv) if gradients else None
    if beta is None:
        return before, None, None
    return before, v.new_empty(count, h, CHUNK, CHUNK), v.new_empty(v.shape) if gradients else None


def _sequences(v: Tensor, cu_seqlens: Tensor | None) -> int:
    return v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@operator("chunks_backward")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    do: Tensor,
    dlast: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Sequence[Tensor],
    scale: float,
    has_state: bool,
) -> list[Tensor]:
    """Gradients at q, k, v, g, beta where there is one, and the states."""
    h, (before, T, written) = v.shape[2], saved
    dq, dk = (torch.empty(*x.shape[:2], h, x.shape[3], dtype=x.dtype, device=x.device) for x in (q, k))
    dv, dg = torch.empty(v.shape, dtype=v.dtype, device=v.device), torch.empty(g.shape, device=g.device)
    dbeta = None if beta is None else torch.empty(beta.shape, device=g.device)
    first = v.new_empty(_sequences(v, cu_seqlens) if has_state else 0, h, v.shape[3], k.shape[3], dtype=torch.float32)
    _kernels(g).run_backward(
        q, k, v, g, beta, evenly(do.to(v.dtype)), None if dlast is None else dlast.float().contiguous(),
        before, T, written, dq, dk, dv, dg, dbeta, first, _planned(cu_seqlens, v.device), scale,
    )  # fmt: skip
    dq, dk = (_of_groups(d, x.shape[2]) for d, x in ((dq, q), (dk, k)))
    return [dq, dk, dv, dg.to(g.dtype), *([] if beta is None or dbeta is None else [dbeta.to(beta.dtype)]), first]


@torch.library.register_fake("plait::chunks_backward")
def _(q, k, v, g, beta, do, dlast, cu_seqlens, saved, scale, has_state):
    rows = _sequences(v, cu_seqlens) if has_state else 0
    first = v.new_empty(rows, *v.shape[2:], k.shape[3], dtype=torch.float32)
    return [*(x.new_empty(x.shape) for x in (q, k, v, g, beta) if x is not None), first]


def _of_groups(x: Tensor, groups: int) -> Tensor:
    """What the heads that share q and k give to them."""
    if x.shape[2] == groups:
        return x
    return x.unflatten(2, (groups, -1)).sum(3, dtype=torch.float32).to(x.dtype)


class Plan(NamedTuple):
    """Of packed documents, on the device: offsets, each one's first chunk, and where each chunk begins and what is left of its
    document from there."""

    cuts: Tensor
    base: Tensor
    table: Tensor


def _planned(cu_seqlens: Tensor | None, device: torch.device) -> Plan | None:
    return None if cu_seqlens is None else _plan(tuple(cu_seqlens.tolist()), device)


@lru_cache(16)
def _plan(cuts: tuple[int, ...], device: torch.device) -> Plan:
    offsets = torch.tensor(cuts)
    lengths = offsets.diff()
    counts = (lengths + CHUNK - 1) // CHUNK
    base = counts.cumsum(0) - counts
    document = torch.repeat_interleave(torch.arange(len(counts)), counts)
    start = (torch.arange(len(document)) - base[document]) * CHUNK
    table = torch.stack([offsets[document] + start, lengths[document] - start], 1)
    return Plan(*(sent(x.int(), device) for x in (offsets, base, table)))
