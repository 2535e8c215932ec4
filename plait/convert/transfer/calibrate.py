"""What weights alone do not say of a new layer's start, read off what the old layer does with some text.

The normed stream that layers read has a direction along which it hardly varies (of a byte model of 4 layers 0.01 to 0.13 of its
mean): a gate without a bias, whose rows lie along it, is open to the same degree for all tokens. Then decays are tried, and
each head gets the one by which its outputs say most of the old head's; and the output projection is solved for.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from plait.convert.transfer.parts import matrix
from plait.convert.transfer.starts import STARTS
from plait.layers import context_for
from plait.layers.attention import AttentionLayer
from plait.layers.declared import MixerModule

Tokens = Float[Tensor, "b t d"]

DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # of the log of a state, a token
READ = 16_384  # tokens of the text
RIDGE = 1e-3  # of the mean square of what is solved from: what is unknown stays as it was carried over


def calibrate(old: AttentionLayer, new: MixerModule, x: Tokens) -> None:
    """In place; x is what the old layer reads in some text, from its beginning on."""
    start = STARTS.get(type(new.config))
    if start is None:
        return
    theirs, heads = _inner(old, x), new.config.heads
    start.gates(new, constant(x.flatten(0, 1)))
    if start.forget is not None:
        misses = []
        for decay in DECAYS:
            start.forget(new, torch.full((heads,), decay, dtype=torch.float64, device=x.device))
            misses.append(missed(_inner(new, x), theirs, heads))
        start.forget(new, torch.tensor(DECAYS, dtype=torch.float64, device=x.device)[torch.stack(misses).argmin(0)])
    output = getattr(new, new.projection)
    if output is not None:
        output.weight.data.copy_(solved(_inner(new, x), theirs, matrix(output), heads))


def some_text(batches: Iterable[Any], length: int) -> Shaped[Tensor, "b t ..."] | None:
    """What `batches` (of `plait.model.objective`) hold first, in rows of `length` at most; None where there are no batches."""
    parts, rows = [], 0
    for batch in batches:
        x = batch.inputs.flatten(0, 1)
        size = min(length, len(x)) if batch.cu_seqlens is not None else min(length, batch.inputs.shape[1])
        if parts and size != parts[0].shape[1]:
            continue
        parts.append(x[: len(x) // size * size].unflatten(0, (-1, size)))
        rows += len(parts[-1])
        if rows * size >= READ:
            break
    return torch.cat(parts)[: max(1, READ // parts[0].shape[1])] if parts else None


def constant(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The direction u, float64, for which u . x is nearest to 1 in all tokens."""
    x = x.double()
    square = x.mT @ x
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    return torch.linalg.solve(square, x.sum(0))


def missed(ours: Float[Tensor, "n w"], theirs: Float[Tensor, "n w"], heads: int) -> Float[Tensor, " h"]:
    """What each head's outputs do not say of the old head's, by the best matrix between them."""
    y, o = (z.unflatten(-1, (heads, -1)).transpose(0, 1) for z in (ours, theirs))  # (h, n, k)
    square = y.mT @ y
    square.diagonal(dim1=-2, dim2=-1).add_(RIDGE * square.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) + 1e-30)
    return (o - y @ torch.linalg.solve(square, y.mT @ o)).square().sum((-2, -1))


def solved(
    ours: Float[Tensor, "n w"], theirs: Float[Tensor, "n w"], before: Float[Tensor, "o w"], heads: int
) -> Float[Tensor, "o w"]:
    """The projection of our outputs nearest to that of theirs by `before`; drawn to `before` with each head as large as the old
    one."""
    y, o = (z.unflatten(-1, (heads, -1)) for z in (ours, theirs))
    size = (y * o).sum((0, 2)) / y.square().sum((0, 2)).clamp_min(1e-30)
    carried = before * size.repeat_interleave(y.shape[-1])
    square = ours.mT @ ours
    square.diagonal().add_(RIDGE * square.diagonal().mean() + 1e-30)
    return carried + torch.linalg.solve(square, ours.mT @ (theirs @ before.mT - ours @ carried.mT)).mT


def _inner(layer: MixerModule, x: Tokens) -> Float[Tensor, "n w"]:
    return layer.inner(x, context_for(x), None)[0].flatten(0, 1).double()
