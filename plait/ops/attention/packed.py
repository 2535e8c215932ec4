"""Attention of packed documents, each to itself, as one operator: a compiled graph holds no document's length.

On a GPU all documents run in one of torch's kernels for sequences of varying length, on a CPU they take turns in its fused one
(`engines`). Where neither fits, documents run one by one in the form for rows (`one_by_one`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from plait.ops.attention import fused
from plait.ops.attention.engines import engine, fits_flash, wide
from plait.ops.attention.spans import spans
from plait.ops.graph import gradient
from plait.ops.kernels import Call, cast
from plait.ops.operator import operator
from plait.ops.packing import Packing, known

CPU = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CUDA = (torch.float32, torch.bfloat16, torch.float16)


class Heads(NamedTuple):
    """Numbers of a key and of a value; whether logits are capped, whether there are sinks and a prefix, and whether these
    stand beside keys from before the call."""

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
    flash = heads is None or fits_flash(call.dtype, heads.key, heads.value)
    return f"torch's {'flash' if flash else 'memory-efficient'} kernel"


def for_rows(call: Call) -> str | None:
    """None, or why whole rows should not run as documents do."""
    heads: Heads | None = call.sizes
    if heads is None or not (heads.sinks or heads.prefix):
        return "for sinks and a prefix beside a window, which torch's kernels for rows do not have"
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
    return _run(q, k, v, sinks, window, prefix, scale, cuts).unflatten(1, (b, t))[0]


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
    return _run(q, k, v, sinks, window, prefix, scale, packing.cu_seqlens)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    window: int | None,
    prefix: int,
    scale: float,
    cu_seqlens: Tensor,
) -> Tensor:
    size, (q, k, v) = v.shape[3], fused.of_one_size(*(narrowed(x) for x in (q, k, v)))
    return _Together.apply(q, k, v, sinks, cu_seqlens, window, prefix, scale)[..., :size]


def narrowed(x: Tensor) -> Tensor:
    """In autocast's dtype: torch's attention would cast it so by itself, its kernels do not."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return cast(x, torch.get_autocast_dtype(kind))


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, sinks, cu_seqlens, window, prefix, scale
    ):  # each by name: without gradients Dynamo miscounts others
        o, lse = _attend(q, k, v, sinks, cu_seqlens, window, prefix, scale)
        ctx.save_for_backward(q, k, v, sinks, cu_seqlens, o, lse)
        ctx.how = window, prefix, scale
        return o

    @staticmethod
    @gradient
    def backward(ctx, do):  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk, dv, *dsinks = _pull(do, *ctx.saved_tensors, *ctx.how)
        return dq, dk, dv, dsinks[0] if dsinks else None, None, None, None, None


@operator("packed_attention")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    window: int | None,
    prefix: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o (1, t, h, v), and the log of every query's sum of weights (h, t)."""
    forward, _ = engine(q, v)
    whole, parts = spans(known(cu_seqlens, q.device), window, prefix)
    o, lse = forward(q, k, v, whole, scale)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in parts:
        its_q, its_k, its_v = part.take([q], [k, v])
        found.append((part.queries.places, *forward(its_q, its_k, its_v, part, scale)))
    if not found and sinks is None:
        return o.contiguous(), lse.contiguous()
    total = lse.clone() if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    for places, _, its_lse in found:
        total[:, places] = torch.logaddexp(total[:, places], its_lse)
    joined = o * _share(lse, total)
    for places, of_part, its_lse in found:
        joined[:, places] += of_part * _share(its_lse, total[:, places])
    return joined.to(o.dtype), total


def _share(lse: Tensor, total: Tensor) -> Tensor:
    """What weighs e^lse of e^total, (t, h, 1)."""
    return (lse - total).exp().T[..., None]


@torch.library.register_fake("plait::packed_attention")
def _(q, k, v, sinks, cu_seqlens, window, prefix, scale):
    _, t, h, _ = q.shape
    return q.new_empty(1, t, h, v.shape[3]), q.new_empty(h, t, dtype=wide(q))


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
    prefix: int,
    scale: float,
) -> list[Tensor]:
    """Gradients at q, k and v, and at sinks where there are some: a sink is one more key that `o` and `lse` are over."""
    _, backward = engine(q, v)
    whole, parts = spans(known(cu_seqlens, q.device), window, prefix)
    do = fused.lined(do.contiguous())
    gradients = [x.contiguous() for x in backward(do, q, k, v, o, lse, whole, scale)]
    for part in parts:
        queries, keys = part.queries.places, part.keys.places
        its_do, its_q, its_o, its_k, its_v = part.take([do, q, o], [k, v])
        found = backward(its_do, its_q, its_k, its_v, its_o, lse[:, queries].contiguous(), part, scale)
        for gradient_of, more, places in zip(gradients, found, (queries, keys, keys), strict=True):
            gradient_of[:, places] += more
    if sinks is not None:
        weight = (sinks.to(lse.dtype)[:, None] - lse).exp()  # (h, t)
        of_o = (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1)[0].T
        gradients.append(-(weight * of_o).sum(1).to(sinks.dtype))
    return gradients


@torch.library.register_fake("plait::packed_attention_backward")
def _(do, q, k, v, sinks, cu_seqlens, o, lse, window, prefix, scale):
    return [x.new_empty(x.shape) for x in (q, k, v, *([] if sinks is None else [sinks]))]
