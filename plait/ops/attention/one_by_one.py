"""Attention of packed documents, one after the other in the forms for rows, where no kernel has them together."""

from collections.abc import Callable

import torch
from torch import Tensor

from plait.ops.attention import chunked, fused, reference
from plait.ops.attention.packed import narrowed
from plait.ops.graph import autograd_inside, gradient
from plait.ops.operator import operator
from plait.ops.packing import Packing, known


def by(form: str) -> Callable[..., Tensor]:
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
            q, k, v = (narrowed(x) for x in (q, k, v))
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
