"""Jacobians of a step, at many tokens at once, and products of them along time.

A step treats every unit alone once the recurrence m is given, so its partial derivatives P = dnew/ds and Q = dnew/dm are
numbers per unit: the gradient of a sum. The Jacobian is P, plus Q R in the column of h. Where R is a vector it stays a small
matrix per unit; where R is a matrix per head it is kept whole for small heads only, and else P alone stands in for it: the
path through the cell itself (shooting.md's diagonal correction).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from plait.ops.graph import autograd_inside
from plait.ops.shooting.cells import Bound

WHOLE_BLOCK = 32  # states times units of a head up to which a block Jacobian costs less than the passes it saves
# numbers looked at at once: on a CPU few enough to stay in its caches, elsewhere so that derivatives do not take several times
# the memory of the sequence
SLICE = {"cpu": 1 << 18}
SLICE_ELSEWHERE = 1 << 25


def slices(x: Tensor) -> Iterator[slice]:
    """Ranges of the first axis of at most SLICE numbers each."""
    step = max(1, SLICE.get(x.device.type, SLICE_ELSEWHERE) // max(1, x[0].numel()))
    for start in range(0, len(x), step):
        yield slice(start, min(start + step, len(x)))


def partials(cell: Bound, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """x (*n, g, h, k), states before (*n, s, h, k) -> P (s, s, *n, h, k), Q (s, g, *n, h, k), first axis of the result."""
    mixed = cell.mix(before.select(-3, 0))
    with autograd_inside():
        s = [ordinary(part).requires_grad_() for part in before.unbind(-3)]
        m = [ordinary(part).requires_grad_() for part in mixed.unbind(-3)]
        tokens, weights = ordinary(x).unbind(-3), tuple(ordinary(w) for w in cell.weights)
        new = cell.cell.step(tokens, tuple(m), tuple(s), weights)
        rows = []
        for i, y in enumerate(new):
            slopes = torch.autograd.grad(
                y, [*s, *m], torch.ones_like(y), retain_graph=i + 1 < len(new), allow_unused=True
            )
            rows.append(torch.stack([torch.zeros_like(y) if g is None else g for g in slopes]))
    both = torch.stack(rows).detach()
    return both[:, : len(s)], both[:, len(s) :]


def ordinary(x: Tensor) -> Tensor:
    """Without its history, and as a tensor that autograd takes: those made in inference mode must be copied."""
    return x.clone() if x.is_inference() else x.detach()


def blocks(cell: Bound) -> bool:
    """Whether the exact Jacobian of a head is small enough to be kept."""
    return not cell.diagonal and len(cell.cell.states) * cell.recurrent.shape[-1] <= WHOLE_BLOCK


def step_jacobians(cell: Bound, x: Tensor, before: Tensor) -> Tensor:
    """Per token: (s, s, *n, h, k) where units are alone (or only P is used), (*n, h, s k, s k) for small heads."""
    P, Q = partials(cell, x, before)
    if cell.diagonal:
        P[:, 0] += torch.einsum("ig...,g...->i...", Q, _over(cell.recurrent, Q[0]))
        return P
    return _block(P, Q, cell.recurrent) if blocks(cell) else P


def _over(weight: Tensor, like: Tensor) -> Tensor:
    """(g, h, k) against (g, *n, h, k)."""
    g, *units = weight.shape
    return weight.view(g, *(1,) * (like.ndim - weight.ndim), *units)


def _block(P: Tensor, Q: Tensor, R: Tensor) -> Tensor:
    s, k = P.shape[0], P.shape[-1]
    J = torch.diag_embed(P.movedim((0, 1), (-3, -2)))  # (*n, h, s, s, k, k), rows before columns
    J[..., 0, :, :] += torch.einsum("ig...hk,ghkl->...hikl", Q, R)
    return J.transpose(-3, -2).reshape(*J.shape[:-4], s * k, s * k)


def chunk_jacobians(cell: Bound, x: Tensor, before: Tensor) -> Tensor:
    """x (c, n, g, h, k), before (c, n, s, h, k): the product along a chunk, without its first axis of time."""
    total = None
    for part in slices(x):
        J = step_jacobians(cell, x[part], before[part])
        product = _block_product(J) if blocks(cell) else _product(J)
        total = product if total is None else (product @ total if blocks(cell) else multiply(product, total))
    assert total is not None
    return total


def multiply(later: Tensor, earlier: Tensor) -> Tensor:
    """Small matrices of numbers per unit: (s, s, *) times (s, s, *)."""
    return later * earlier if len(later) == 1 else torch.einsum("ij...,jk...->ik...", later, earlier)


def _product(J: Tensor) -> Tensor:
    """(s, s, c, *n) -> (s, s, *n), the latest to the left."""
    if len(J) == 1:
        return J.prod(2)
    while J.shape[2] > 1:
        odd = J[:, :, -1:] if J.shape[2] % 2 else None
        even = J.shape[2] // 2 * 2
        J = multiply(J[:, :, 1:even:2], J[:, :, 0:even:2])
        J = J if odd is None else torch.cat([J, odd], 2)
    return J[:, :, 0]


def _block_product(J: Tensor) -> Tensor:
    """(c, *n, m, m) -> (*n, m, m)."""
    while len(J) > 1:
        odd = J[-1:] if len(J) % 2 else None
        even = len(J) // 2 * 2
        J = J[1:even:2] @ J[0:even:2]
        J = J if odd is None else torch.cat([J, odd])
    return J[0]


def apply(J: Tensor, v: Tensor, block: bool, transposed: bool = False) -> Tensor:
    """J v (or J^T v) for v (*n, s, h, k); J (*n, h, s k, s k) if `block`, else (s, s, *n, h, k)."""
    if not block:
        return torch.einsum("ji...hk,...jhk->...ihk" if transposed else "ij...hk,...jhk->...ihk", J, v)
    flat = v.transpose(-3, -2).flatten(-2)[..., None]  # (*n, h, s k, 1)
    y = (J.mT if transposed else J) @ flat
    return y[..., 0].unflatten(-1, (v.shape[-3], -1)).transpose(-3, -2)
