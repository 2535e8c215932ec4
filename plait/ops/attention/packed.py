"""Attention of packed documents, each to itself, as one operator: a compiled graph holds no document's length.

On a GPU all documents run in one of torch's kernels for sequences of varying length. On a CPU they take turns in torch's
fused kernel, inside the operator: a row of 2048 tokens in 4 heads of 64, one core, forward and backward, took 19 ms in 45
documents and 45 ms in 11, where autograd over a call for each took 31 and 56 ms, rows of like length padded to one another
24 and 48 ms, and one call with a mask 240 ms. Where neither kernel fits, documents run one by one in the form for rows.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plait.ops.attention import chunked, fused, reference
from plait.ops.attention.flash import WIDEST
from plait.ops.attention.reference import positions, visible
from plait.ops.graph import autograd_inside, gradient
from plait.ops.kernels import Call, cast
from plait.ops.operator import operator
from plait.ops.packing import Packing, known

aten: Any = torch.ops.aten  # kernels that torch calls by name alone

CPU = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CUDA = (torch.float32, torch.bfloat16, torch.float16)
CAUSAL = 1  # `custom_mask_type` of the memory-efficient kernel


class Heads(NamedTuple):
    """Numbers of a key and of a value; whether logits are capped, whether there are sinks and a prefix, and whether sinks stand
    beside keys from before the call."""

    key: int
    value: int
    capped: bool = False
    sinks: bool = False
    prefix: bool = False
    past: bool = False


def supports(call: Call) -> str | None:
    """None, or why documents cannot share torch's fused kernels."""
    heads: Heads | None = call.sizes
    if heads is not None and heads.capped:
        return "no fused kernel caps logits"
    if heads is not None and heads.prefix:
        return "no fused kernel sees a prefix beside a window"
    if call.device == "cuda":
        return None if call.dtype in CUDA else f"no kernel for {call.dtype}"
    if call.device != "cpu":
        return f"no kernel for {call.device}"
    return None if call.dtype in CPU else f"no kernel for {call.dtype}"


def within(call: Call) -> str | None:
    """The kernel of torch's that documents share."""
    if call.device == "cpu":
        return "torch's flash kernel, document by document"
    heads: Heads | None = call.sizes
    flash = heads is None or _fits_flash(call.dtype, heads.key, heads.value)
    return f"torch's {'flash' if flash else 'memory-efficient'} kernel"


def _fits_flash(dtype: torch.dtype, key: int, value: int) -> bool:
    return dtype != torch.float32 and key == value <= WIDEST


def for_rows(call: Call) -> str | None:
    """None, or why whole rows should not run as documents do."""
    heads: Heads | None = call.sizes
    if heads is None or not heads.sinks:
        return "for sinks, which torch's kernels for rows do not have"
    if heads.past or call.tokens == "one":
        return "for rows without a past"
    return supports(call)


def rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    q_start: int,
    k_start: int,
    window: int | None,
    prefix: int,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Rows of one length and without a past, as documents. Shapes as in `attention`."""
    (b, t), (q, k, v) = q.shape[:2], (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    cuts = torch.arange(0, b * t + 1, t, device="cpu")
    return _run(q, k, v, sinks, window, scale, cuts).unflatten(1, (b, t))[0]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    window: int | None,
    prefix: int,
    softcap: float | None,
    scale: float,
    packing: Packing,
) -> Tensor:
    """Shapes as in `attention`."""
    return _run(q, k, v, sinks, window, scale, packing.cu_seqlens)


def _run(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int | None, scale: float, cu_seqlens: Tensor
) -> Tensor:
    size, (q, k, v) = v.shape[3], fused.of_one_size(*(_narrowed(x) for x in (q, k, v)))
    return _Together.apply(q, k, v, sinks, cu_seqlens, window, scale)[..., :size]


def _narrowed(x: Tensor) -> Tensor:
    """In autocast's dtype: torch's attention would cast it so by itself, its kernels do not."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return cast(x, torch.get_autocast_dtype(kind))


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, sinks, cu_seqlens, window, scale
    ):  # each by name: without gradients Dynamo miscounts others
        o, lse = _attend(q, k, v, sinks, cu_seqlens, window, scale)
        ctx.save_for_backward(q, k, v, sinks, cu_seqlens, o, lse)
        ctx.how = window, scale
        return o

    @staticmethod
    @gradient
    def backward(ctx, do):  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk, dv, *dsinks = _pull(do, *ctx.saved_tensors, *ctx.how)
        return dq, dk, dv, dsinks[0] if dsinks else None, None, None, None


@operator("packed_attention")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o (1, t, h, v), and the log of every query's sum of weights (h, t)."""
    forward, _ = _engine(q, v)
    o, lse = forward(q, k, v, known(cu_seqlens, q.device), window, scale)
    if sinks is None:
        return o.contiguous(), lse.contiguous()
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return o * (lse - total).exp().T[..., None].to(o.dtype), total


@torch.library.register_fake("plait::packed_attention")
def _(q, k, v, sinks, cu_seqlens, window, scale):
    _, t, h, _ = q.shape
    return q.new_empty(1, t, h, v.shape[3]), q.new_empty(h, t, dtype=_wide(q))


@operator("packed_attention_backward")
def _pull(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    o: Tensor,
    lse: Tensor,
    window: int | None,
    scale: float,
) -> list[Tensor]:
    """Gradients at q, k and v, and at sinks where there are some.

    A kernel has weights from `lse` and what is taken off their gradients from `o`: where both are those with a sink, so is all
    that it gives, and the sink is one more key that all of this is true of.
    """
    _, backward = _engine(q, v)
    gradients = backward(fused.lined(do.contiguous()), q, k, v, o, lse, known(cu_seqlens, q.device), window, scale)
    gradients = [x.contiguous() for x in gradients]
    if sinks is not None:
        weight = (sinks.to(lse.dtype)[:, None] - lse).exp()  # (h, t)
        of_o = (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1)[0].T
        gradients.append(-(weight * of_o).sum(1).to(sinks.dtype))
    return gradients


@torch.library.register_fake("plait::packed_attention_backward")
def _(do, q, k, v, sinks, cu_seqlens, o, lse, window, scale):
    return [x.new_empty(x.shape) for x in (q, k, v, *([] if sinks is None else [sinks]))]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _engine(q: Tensor, v: Tensor) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, ...]]]:
    if q.device.type == "cpu":
        return _in_turn, _in_turn_back
    return (_flash, _flash_back) if _fits_flash(q.dtype, q.shape[3], v.shape[3]) else (_efficient, _efficient_back)


# --- one after the other, on a CPU


def _pieces(packing: Packing, window: int | None, like: Tensor) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Queries, the keys that they see, and the mask where it is not causal from the first key on."""
    masks: dict[tuple[int, int], Tensor] = {}
    for start, end in packing.bounds:
        for first in range(start, end, window or end - start):
            last, low = min(end, first + (window or end)), max(start, first - (window or end) + 1)
            mask, shape = None, (last - first, last - low)
            if low < first:
                if shape not in masks:
                    q_at, k_at = positions(first - low, shape[0], like.device), positions(0, shape[1], like.device)
                    hidden = ~visible(q_at, k_at, window)
                    masks[shape] = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
                mask = masks[shape]
            yield slice(first, last), slice(low, last), mask


def _heads(x: Tensor, place: slice) -> Tensor:
    return x[:, place].transpose(1, 2)


def _in_turn(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    _, t, h, _ = q.shape
    o, lse = q.new_empty(1, t, h, v.shape[3]), q.new_empty(h, t, dtype=_wide(q))
    for queries, keys, mask in _pieces(packing, window, q):
        parts = _heads(q, queries), _heads(k, keys), _heads(v, keys)
        part, lse[:, queries] = aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        _heads(o, queries).copy_(part)
    return o, lse


def _in_turn_back(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    packing: Packing,
    window: int | None,
    scale: float,
) -> tuple[Tensor, ...]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys, mask in _pieces(packing, window, q):
        parts = _heads(q, queries), _heads(k, keys), _heads(v, keys), _heads(o, queries)
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads(do, queries), *parts, lse[None, :, queries], 0.0, mask is None, attn_mask=mask, scale=scale
        )
        _heads(dq, queries).copy_(gradients[0])
        _heads(dk, keys).add_(gradients[1])
        _heads(dv, keys).add_(gradients[2])
    return dq, dk, dv


# --- together, on a GPU


def _repeated(x: Float[Tensor, "1 t g k"], heads: int) -> Float[Tensor, "1 t h k"]:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _summed(x: Float[Tensor, "1 t h k"], like: Float[Tensor, "1 t g k"]) -> Float[Tensor, "1 t g k"]:
    return x if x.shape == like.shape else x.unflatten(2, (like.shape[2], -1)).sum(3)


def _lengths(packing: Packing) -> tuple[Tensor, Tensor, int, int]:
    cuts, longest = packing.cuts, max(packing.lengths)
    return cuts, cuts, longest, longest


def _aligned(x: Float[Tensor, "1 t h k"]) -> Float[Tensor, "1 t h l"]:
    """Heads of a multiple of eight numbers, which the kernels want; the last ones are zero."""
    missing = -x.shape[3] % 8
    return F.pad(x, (0, missing)) if missing else x


def _sides(window: int | None) -> dict[str, int]:
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": -1 if window is None else 0}


def _flash(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    parts = [_aligned(x)[0] for x in (q, k, v)]
    o, lse, *_ = aten._flash_attention_forward(
        *parts, *_lengths(packing), 0.0, window is None, False, scale=scale, **_sides(window)
    )
    return o[None, ..., : v.shape[3]], lse


def _flash_back(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    packing: Packing,
    window: int | None,
    scale: float,
) -> tuple[Tensor, ...]:
    parts = [_aligned(x)[0] for x in (do, q, k, v, o)]
    random = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # nothing is dropped
    found = aten._flash_attention_backward(
        *parts, lse, *_lengths(packing), 0.0, window is None, *random, scale=scale, **_sides(window)
    )
    return tuple(x[None, ..., : like.shape[3]] for x, like in zip(found, (q, k, v), strict=True))


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    h = q.shape[2]
    parts = _aligned(q), _aligned(_repeated(k, h)), _aligned(_repeated(v, h))
    o, lse, *_ = aten._efficient_attention_forward(
        *parts, None, *_lengths(packing), 0.0, CAUSAL, True, scale=scale, window_size=window
    )
    return o[..., : v.shape[3]], lse[packing.documents, :, packing.offsets[0]].T


def _efficient_back(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    packing: Packing,
    window: int | None,
    scale: float,
) -> tuple[Tensor, ...]:
    (_, _, h, size), (*lengths, longest) = q.shape, _lengths(packing)
    by_document = lse.new_full((packing.count, h, longest + -longest % 32), torch.inf)  # as the kernel gave it
    by_document[packing.documents, :, packing.offsets[0]] = lse.T
    parts = [_aligned(x) for x in (do, q, _repeated(k, h), _repeated(v, h))]
    random = [torch.zeros((), dtype=torch.int64, device=q.device)] * 2  # nothing is dropped
    dq, dk, dv, _ = aten._efficient_attention_backward(
        *parts, None, _aligned(o), *lengths, longest, by_document, 0.0, *random, CAUSAL, False, scale=scale,
        window_size=window,
    )  # fmt: skip
    return dq[..., :size], _summed(dk[..., :size], k), _summed(dv[..., : v.shape[3]], v)


# --- one by one, in the forms for rows


def one_by_one(form: str) -> Callable[..., Tensor]:
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        window: int | None,
        prefix: int,
        softcap: float | None,
        scale: float,
        packing: Packing,
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            return _apart(q, k, v, sinks, packing, window, prefix, softcap, scale, form)
        if form == "chunked" and softcap is None and sinks is None:
            q, k, v = (_narrowed(x) for x in (q, k, v))
        return _Apart.apply(q, k, v, sinks, packing.cu_seqlens, window, prefix, softcap, scale, form)

    return run


def _apart(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    packing: Packing,
    window: int | None,
    prefix: int,
    softcap: float | None,
    scale: float,
    form: str,
) -> Tensor:
    run = {"chunked": chunked.run, "reference": reference.run}[form]

    def documents() -> Tensor:
        how = window, prefix, softcap, scale
        parts = [(a, b, min(prefix, b - a)) for a, b in packing.bounds]
        return torch.cat([run(q[:, a:b], k[:, a:b], v[:, a:b], sinks, 0, first, *how) for a, b, first in parts], 1)

    return fused.for_any_length(documents) if q.device.type in fused.DEVICES else documents()


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, cu_seqlens, window, prefix, softcap, scale, form):
        ctx.save_for_backward(q, k, v, sinks, cu_seqlens)
        ctx.how = window, prefix, softcap, scale, form
        return _attend_apart(q, k, v, sinks, cu_seqlens, *ctx.how)

    @staticmethod
    @gradient
    def backward(ctx, do):  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk, dv, *dsinks = _pull_apart(do, *ctx.saved_tensors, *ctx.how)
        return dq, dk, dv, dsinks[0] if dsinks else None, None, *(None for _ in ctx.how)


@operator("attention_by_document")
def _attend_apart(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    window: int | None,
    prefix: int,
    softcap: float | None,
    scale: float,
    form: str,
) -> Tensor:
    return _apart(q, k, v, sinks, known(cu_seqlens, q.device), window, prefix, softcap, scale, form).contiguous()


@torch.library.register_fake("plait::attention_by_document")
def _(q, k, v, sinks, cu_seqlens, window, prefix, softcap, scale, form):
    return v.new_empty(*q.shape[:3], v.shape[3])


@operator("attention_by_document_backward")
def _pull_apart(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    window: int | None,
    prefix: int,
    softcap: float | None,
    scale: float,
    form: str,
) -> list[Tensor]:
    """Gradients at q, k, v and sinks, for which the documents run again."""
    packing = known(cu_seqlens, q.device)
    with autograd_inside():
        q, k, v, *rest = leaves = [x.detach().requires_grad_() for x in (q, k, v, sinks) if x is not None]
        sinks = rest[0] if rest else None
        gradients = torch.autograd.grad(
            _apart(q, k, v, sinks, packing, window, prefix, softcap, scale, form), leaves, do
        )
    return [x.contiguous() for x in gradients]


@torch.library.register_fake("plait::attention_by_document_backward")
def _(do, q, k, v, sinks, cu_seqlens, window, prefix, softcap, scale, form):
    return [x.new_empty(x.shape) for x in (q, k, v, *([] if sinks is None else [sinks]))]
