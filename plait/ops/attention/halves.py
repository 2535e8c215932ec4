"""Causal attention of whole rows on a CPU, without most of the products that the mask throws away.

torch's kernel takes 512 keys at a time and computes each such block in full. Here a row is cut in halves: either attends to
itself as a row of its own, and the later one to all of the earlier without a mask; and so on inside the halves, all of one
size in one call. Softmaxes over parts of the keys join by the logs of their sums, and each part has its share of the gradient
from the sum and the output of the whole (as in ring attention, arXiv 2310.01889).

Forward and backward at B 2, 4 heads of 64 on one AVX2 core, over torch's kernel alone: 0.89 at 256 tokens, 0.72 at 512, 0.85
at 768, 0.93 at 1,024.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from plait.ops.graph import gradient, one_step
from plait.ops.kernels import WIDE
from plait.ops.operator import operator

aten: Any = torch.ops.aten

LEAST = 64  # queries of the shortest piece: below that a call costs more than it saves
MOST = 1024  # tokens of a row: of longer ones the kernel itself leaves out most of what nobody sees


def pieces(q: Tensor) -> int:
    """Into how many rows of q (b, t, h, k) are best cut, a power of two; 1: torch's kernel does better alone. In half precision
    every part would be rounded before it is joined, and a graph would hold the length."""
    narrow = q.dtype not in WIDE or torch.is_autocast_enabled("cpu")
    if q.device.type != "cpu" or q.shape[1] > MOST or narrow or torch.compiler.is_compiling():
        return 1
    count, t = 1, q.shape[1]
    while t % 2 == 0 and t >= 2 * LEAST:
        count, t = 2 * count, t // 2
    return count


def run(
    q: Float[Tensor, "b t h k"], k: Float[Tensor, "b t g k"], v: Float[Tensor, "b t g k"], scale: float, count: int
) -> Float[Tensor, "b t h k"]:
    """Query i sees the keys up to i; `count` divides t."""
    return _halved(q, k, v, scale, count)


@operator("attention_in_halves")
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, pieces: int) -> list[Tensor]:
    """o, and the log of every query's sum of weights. One operator: what it works on in place is nobody else's."""
    count = pieces
    o, lse = _attend(*(_cut(x, count) for x in (q, k, v)), scale=scale, causal=True)
    o, lse = o.view(*q.shape[:3], -1), lse.view(q.shape[:3])
    while count > 1:
        count //= 2
        (_, late), (k_early, _), (v_early, _) = (_halves(x, count) for x in (q, k, v))
        part, part_lse = _attend(late, k_early, v_early, scale=scale, causal=False)
        _, o_late = _halves(o, count)
        _, lse_late = _halves(lse, count)
        o_late.lerp_(part, torch.sigmoid(part_lse - lse_late)[..., None])
        lse_late.copy_(torch.logaddexp(lse_late, part_lse))
    return [o, lse]


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, pieces: int) -> Tensor:
        o, lse = _forward(q, k, v, scale, pieces)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.how = scale, pieces
        return o

    @staticmethod
    @gradient
    def backward(ctx, do: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        scale, count = ctx.how
        parts = do, *ctx.saved_tensors
        gradients = _pull(*(_cut(x, count) for x in parts), scale=scale, causal=True)
        dq, dk, dv = (x.view(like.shape) for x, like in zip(gradients, parts[1:4], strict=True))
        while count > 1:
            count //= 2
            early, late = zip(*(_halves(x, count) for x in parts), strict=True)
            gradients = _pull(*late[:2], *early[2:4], *late[4:], scale=scale, causal=False)
            places = _halves(dq, count)[1], _halves(dk, count)[0], _halves(dv, count)[0]
            for place, part in zip(places, gradients, strict=True):
                place.add_(part)
        return dq, dk, dv, None, None


_halved = one_step(_Halved)


def _cut(x: Float[Tensor, "b t *h"], count: int) -> Float[Tensor, "b*count t/count *h"]:
    return x.reshape(len(x) * count, -1, *x.shape[2:])


def _halves(x: Float[Tensor, "b t *h"], count: int) -> tuple[Tensor, ...]:
    """The earlier and the later halves of all `count` pieces of the rows, each (b*count, t/count/2, *h)."""
    return x.reshape(len(x) * count, 2, -1, *x.shape[2:]).unbind(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """o (b, t, h, k), and the log of every query's sum of weights (b, t, h)."""
    parts = (x.transpose(1, 2) for x in (q, k, v))
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, causal, scale=scale)
    return o.transpose(1, 2), lse.transpose(1, 2)


def _pull(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    """Gradients at q, k and v."""
    parts = (x.transpose(1, 2) for x in (do, q, k, v, o, lse))
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(*parts, 0.0, causal, scale=scale)
    return tuple(x.transpose(1, 2) for x in gradients)
