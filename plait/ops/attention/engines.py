"""torch's kernels for packed documents, forward and backward: one call of `Span` each.

On a CPU documents take turns in its fused kernel: a row of 2048 tokens in 4 heads of 64, one core, forward and backward, took
19 ms in 45 documents and 45 ms in 11, where autograd over a call for each took 31 and 56 ms, rows of like length padded to one
another 24 and 48 ms, and one call with a mask 240 ms.
A backward kernel has weights from `lse` and what is taken off their gradients from `o`: where both are over more keys than the
span's, so is all that it gives.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plait.ops.attention.flash import WIDEST
from plait.ops.attention.reference import positions, visible
from plait.ops.attention.spans import Span

aten: Any = torch.ops.aten  # kernels that torch calls by name alone

NO_MASK, CAUSAL = 0, 1  # `custom_mask_type` of the memory-efficient kernel


class Forward(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float) -> tuple[Tensor, Tensor]:
        """o (1, q, h, v), and the log of every query's sum of weights (h, q)."""
        ...


class Backward(Protocol):
    def __call__(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, span: Span, scale: float
    ) -> tuple[Tensor, ...]:
        """Gradients at q, k and v."""
        ...


def engine(q: Tensor, v: Tensor) -> tuple[Forward, Backward]:
    if q.device.type == "cpu":
        return in_turn, in_turn_back
    return (flash, flash_back) if fits_flash(q.dtype, q.shape[3], v.shape[3]) else (efficient, efficient_back)


def fits_flash(dtype: torch.dtype, key: int, value: int) -> bool:
    return dtype != torch.float32 and key == value <= WIDEST


def wide(x: Tensor) -> torch.dtype:
    """Of sums of weights."""
    return torch.promote_types(x.dtype, torch.float32)


# --- one after the other, on a CPU


def _pieces(span: Span, like: Tensor) -> Iterator[tuple[slice, slice, bool, Tensor | None]]:
    """Queries, the keys that they see, whether these are causal from the first key on, and the mask where they are not."""
    window, masks = span.window, dict[tuple[int, int], Tensor]()
    for (start, end), (begin, stop) in zip(span.queries.bounds, span.keys.bounds, strict=True):
        if not span.causal:
            yield slice(start, end), slice(begin, stop), False, None
            continue
        for first in range(start, end, window or end - start):
            last, low = min(end, first + (window or end)), max(start, first - (window or end) + 1)
            mask, shape = None, (last - first, last - low)
            if low < first:
                if shape not in masks:
                    q_at, k_at = positions(first - low, shape[0], like.device), positions(0, shape[1], like.device)
                    hidden = ~visible(q_at, k_at, window)
                    masks[shape] = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
                mask = masks[shape]
            yield slice(first, last), slice(low - start + begin, last - start + begin), mask is None, mask


def _heads(x: Tensor, place: slice) -> Tensor:
    return x[:, place].transpose(1, 2)


def in_turn(q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float) -> tuple[Tensor, Tensor]:
    _, t, h, _ = q.shape
    o, lse = q.new_empty(1, t, h, v.shape[3]), q.new_empty(h, t, dtype=wide(q))
    for queries, keys, causal, mask in _pieces(span, q):
        parts = _heads(q, queries), _heads(k, keys), _heads(v, keys)
        part, lse[:, queries] = aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, 0.0, causal, attn_mask=mask, scale=scale
        )
        _heads(o, queries).copy_(part)
    return o, lse


def in_turn_back(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, span: Span, scale: float
) -> tuple[Tensor, ...]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys, causal, mask in _pieces(span, q):
        parts = _heads(q, queries), _heads(k, keys), _heads(v, keys), _heads(o, queries)
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads(do, queries), *parts, lse[None, :, queries], 0.0, causal, attn_mask=mask, scale=scale
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


def _aligned(x: Float[Tensor, "1 t h k"]) -> Float[Tensor, "1 t h l"]:
    """Heads of a multiple of eight numbers, which the kernels want; the last ones are zero."""
    missing = -x.shape[3] % 8
    return F.pad(x, (0, missing)) if missing else x


def _sides(window: int | None) -> dict[str, int]:
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": -1 if window is None else 0}


def _plainly(span: Span) -> bool:
    """Whether the flash kernel is told of causality, which it lines up at the ends: those of queries and keys are the same
    where a span is causal."""
    return span.causal and span.window is None


def flash(q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float) -> tuple[Tensor, Tensor]:
    parts = [_aligned(x)[0] for x in (q, k, v)]
    o, lse, *_ = aten._flash_attention_forward(
        *parts, *span.lengths, 0.0, _plainly(span), False, scale=scale, **_sides(span.window)
    )
    return o[None, ..., : v.shape[3]], lse


def flash_back(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, span: Span, scale: float
) -> tuple[Tensor, ...]:
    parts = [_aligned(x)[0] for x in (do, q, k, v, o)]
    random = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # nothing is dropped
    found = aten._flash_attention_backward(
        *parts, lse, *span.lengths, 0.0, _plainly(span), *random, scale=scale, **_sides(span.window)
    )
    return tuple(x[None, ..., : like.shape[3]] for x, like in zip(found, (q, k, v), strict=True))


def efficient(q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float) -> tuple[Tensor, Tensor]:
    (h, of), kind = (q.shape[2], span.queries), CAUSAL if span.causal else NO_MASK
    parts = _aligned(q), _aligned(_repeated(k, h)), _aligned(_repeated(v, h))
    o, lse, *_ = aten._efficient_attention_forward(
        *parts, None, *span.lengths, 0.0, kind, True, scale=scale, window_size=span.window
    )
    return o[..., : v.shape[3]], lse[of.documents, :, of.offsets[0]].T


def efficient_back(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, span: Span, scale: float
) -> tuple[Tensor, ...]:
    (_, _, h, size), of, (*cuts, longest, longest_keys) = q.shape, span.queries, span.lengths
    by_document = lse.new_full((of.count, h, longest + -longest % 32), torch.inf)  # as the kernel gave it
    by_document[of.documents, :, of.offsets[0]] = lse.T
    parts = [_aligned(x) for x in (do, q, _repeated(k, h), _repeated(v, h))]
    random = [torch.zeros((), dtype=torch.int64, device=q.device)] * 2  # nothing is dropped
    kind = CAUSAL if span.causal else NO_MASK
    dq, dk, dv, _ = aten._efficient_attention_backward(
        *parts, None, _aligned(o), *cuts, longest, longest_keys, by_document, 0.0, *random, kind, False, scale=scale,
        window_size=span.window,
    )  # fmt: skip
    return dq[..., :size], _summed(dk[..., :size], k), _summed(dv[..., : v.shape[3]], v)
