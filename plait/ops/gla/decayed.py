"""Products of rows and keys of one chunk under a decay per channel, D_ij = sum_c x_ic y_jc exp(g_(j+1)c + ... + g_(i-1)c) for
j < i, without ever taking exp of anything but a sum of logs. The last kind of rows reads after its token's own decay, and its
token's own key too: D_ij = sum_c x_ic y_jc exp(g_(j+1)c + ... + g_ic) for j <= i.

A chunk is halved again and again. Where tokens i of the right half meet tokens j of the left half, between them lies the
decay from the middle to i times that from j to the middle: both at most 1, and one product of matrices for all pairs. From one
level to the next, rows grow by the decay of the whole block before their own, and keys by that of the block after it:
neither a difference nor a quotient of decays is ever formed, forward or in the gradient, and so none can drown in
rounding. When all is joined, rows hold the decay since the chunk's start, and keys that to its end.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from plait.ops.decay import decay_
from plait.ops.graph import gradient, one_step
from plait.ops.operator import operator

Halves = tuple[Tensor, Tensor]


class _Decayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p: Tensor | None, q: Tensor, z: Tensor | None, k: Tensor, g: Tensor):
        ctx.save_for_backward(p, q, z, k, g)
        return _forward(p, q, z, k, g)

    @staticmethod
    @gradient
    def backward(ctx, *gradients: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        p, q, z, k, g = ctx.saved_tensors
        dx, dy, dg = _backward(p, q, z, k, g, *gradients)
        return None if p is None else dx[:, :, 0], dx[:, :, -1], None if z is None else dy[:, :, 0], dy[:, :, -1], dg


# Operators: with each level's products as steps of a graph inductor took minutes over the gradient's.


@operator("decayed", cheap=True)
def _forward(
    p: Tensor | None, q: Tensor, z: Tensor | None, k: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D (n, c r, c s), rows, keys and decay as in `decayed`."""
    x, y, size = _beside(p, q), _beside(z, k), 1
    (n, c, r, _), s = x.shape, y.shape[2]
    D, q = x.new_zeros(n, c * r, c * s), x[:, :, -1]
    _own(D, r, s).copy_((q[:, :, None] * y).sum(-1))
    q.mul_(decay_(g.clone()))
    while size < c:
        (late, early), (a_left, a_right) = _halves(x, y, size), _totals(g)
        _meeting(D, size * r, size * s).copy_(_spread(late.flatten(1, 2) @ early.flatten(1, 2).mT, n))
        late.mul_(a_left[:, None, None])
        early.mul_(a_right[:, None, None])
        g, size = g.unflatten(1, (-1, 2)).sum(2), 2 * size
    return D, x, y, decay_(g[:, 0].clone())


@torch.library.register_fake("plait::decayed")
def _(p, q, z, k, g):
    (n, c, d), r, s = q.shape, 1 if p is None else 2, 1 if z is None else 2
    return q.new_empty(n, c * r, c * s), q.new_empty(n, c, r, d), k.new_empty(n, c, s, d), g.new_empty(n, d)


@operator("decayed_backward")
def _backward(
    p: Tensor | None,
    q: Tensor,
    z: Tensor | None,
    k: Tensor,
    g: Tensor,
    dD: Tensor,
    dx: Tensor,
    dy: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows (n, c, r, k), keys (n, c, s, k) and g."""
    x, y, a, levels, size = _beside(p, q), _beside(z, k), decay_(g.clone()), [], 1
    (n, c, r, _), s = x.shape, y.shape[2]
    x[:, :, -1].mul_(a)
    while size < c:  # the same again: to keep it would take three times the room of x and y
        (late, early), (a_left, a_right) = _halves(x, y, size), _totals(g)
        levels.append((late.clone(), early.clone(), a_left[:, None, None], a_right[:, None, None]))
        late.mul_(a_left[:, None, None])
        early.mul_(a_right[:, None, None])
        g, size = g.unflatten(1, (-1, 2)).sum(2), 2 * size
    dx, dy = _copy(dx), _copy(dy)
    dg = (dlast * decay_(g[:, 0].clone()))[:, None]  # of the sums of g over blocks
    for late, early, a_left, a_right in reversed(levels):
        size //= 2
        dlate, dearly = _halves(dx, dy, size)
        dlate.mul_(a_left)
        dearly.mul_(a_right)
        left, right = (dlate * late).sum((1, 2)), (dearly * early).sum((1, 2))
        dg = (dg.flatten(0, 1)[:, None] + torch.stack([left, right], 1)).view(n, -1, dg.shape[-1])
        meeting = _gathered(_meeting(dD, size * r, size * s))
        dlate.add_((meeting @ early.flatten(1, 2)).view_as(dlate))
        dearly.add_((meeting.mT @ late.flatten(1, 2)).view_as(dearly))
    dq, down = dx[:, :, -1].mul_(a), _own(dD, r, s)[..., None]
    dg = torch.addcmul(dg, dq, q)
    dq.add_((down * _beside(z, k)).sum(2))
    dy.addcmul_(down, q[:, :, None])
    return dx, dy, dg


@torch.library.register_fake("plait::decayed_backward")
def _(p, q, z, k, g, dD, dx, dy, dlast):
    return dx.new_empty(dx.shape), dy.new_empty(dy.shape), g.new_empty(g.shape)


_decayed = one_step(_Decayed)


def decayed(
    p: Float[Tensor, "n c k"] | None,
    q: Float[Tensor, "n c k"],
    z: Float[Tensor, "n c k"] | None,
    k: Float[Tensor, "n c k"],
    g: Float[Tensor, "n c k"],
) -> tuple[Float[Tensor, "n c r c s"], Float[Tensor, "n c r k"], Float[Tensor, "n c s k"], Float[Tensor, "n k"]]:
    """D of r rows and s keys a token, p and q, z and k, as many as there are; the rows times the decay since the chunk's start;
    the keys times that to its end; the decay of the whole chunk. c is a power of 2."""
    D, x, y, last = _decayed(p, q, z, k, g)
    return D.view(*x.shape[:3], *y.shape[1:3]), x, y, last


def _copy(x: Tensor) -> Tensor:
    """One that blocks of are views of."""
    return x.clone(memory_format=torch.contiguous_format)


def _beside(first: Tensor | None, last: Tensor) -> Float[Tensor, "n c kinds k"]:
    """Kinds side by side, in a tensor of their own."""
    return _copy(last[:, :, None]) if first is None else torch.stack([first, last], 2)


def _halves(x: Tensor, y: Tensor, size: int) -> Halves:
    """Rows of every second block of so many tokens, and keys of the blocks before these: (n blocks/2, size, kinds, k)."""
    late, early = (z.view(-1, 2, size, *z.shape[2:]) for z in (x, y))
    return late[:, 1], early[:, 0]


def _totals(g: Float[Tensor, "n blocks k"]) -> Halves:
    """The decay over every block before a second one, and over these."""
    a = decay_(g.clone()).flatten(0, 1).unflatten(0, (-1, 2))
    return a[:, 0], a[:, 1]


def _meeting(D: Float[Tensor, "n rows keys"], rows: int, keys: int) -> Float[Tensor, "n rows keys pairs"]:
    """Where these blocks' rows meet the keys of those before them."""
    pairs = D.shape[1] // (2 * rows)
    return D.view(-1, pairs, 2, rows, pairs, 2, keys)[:, :, 1, :, :, 0].diagonal(0, 1, 3)


def _own(D: Float[Tensor, "n rows keys"], r: int, s: int) -> Float[Tensor, "n c s"]:
    """Where the last kind of rows meets its token's own keys."""
    return D.unflatten(2, (-1, s)).unflatten(1, (-1, r))[:, :, -1].diagonal(0, 1, 2).mT


def _spread(blocks: Float[Tensor, "n*pairs rows keys"], n: int) -> Float[Tensor, "n rows keys pairs"]:
    return blocks.unflatten(0, (n, -1)).permute(0, 2, 3, 1)


def _gathered(meeting: Float[Tensor, "n rows keys pairs"]) -> Float[Tensor, "n*pairs rows keys"]:
    return meeting.permute(0, 3, 1, 2).flatten(0, 1)
