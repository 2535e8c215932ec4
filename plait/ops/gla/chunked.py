"""The recurrence with a decay per key channel in chunks: attention-like products inside a chunk (`plait.ops.gla.decayed`), and
a loop over chunks.

With E_i the log decay from the chunk's start to just before token i, G_j that to just after token j, what is removed,
u_i = S_{i-1} p_i, solves a unit lower triangular system over a chunk that starts from S:

    (I - P_z) U = P_k V + (p e^E) S^T    with P_y,ij = sum_c p_ic y_jc exp(E_ic - G_jc) for j < i

Solved for [P_k V, p e^E] at once, U = U' + W S^T, so that one step over a chunk is S <- S (diag(a) + W^T Z) + U'^T Z + V^T K,
keys decayed to the chunk's end. Where z is k, U + V takes the place of both: it solves the same system for V alone.
"""

from collections.abc import Iterable
from itertools import repeat

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import hardshrink

from plait.ops.decay import decay_of
from plait.ops.gla.decayed import decayed
from plait.ops.graph import gradient, one_step
from plait.ops.operator import operator
from plait.ops.packing import CHUNK, Packing, chunks, each_document
from plait.ops.triangular import solve

PART = 4096  # chunks that a CPU works on together: enough for its vector units, and little enough for its caches
FORGOTTEN = -100.0  # a log of a decay that is 0, since below `plait.ops.decay.FLOOR`


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    p: Tensor | None = None,
    z: Tensor | None = None,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:
    """Shapes as in `gla` and `dplr`."""
    if packing is not None and state is not None:
        tensors = [x for x in (q, k, v, g, p, z) if x is not None]
        return each_document(lambda *x, state: _dense(*x, state=state)[:2], tensors, state, packing)
    if packing is not None:  # a document's first token finds nothing, and nothing is left of the one before
        first = (packing.offsets == 0)[..., None, None]
        g, p = g.masked_fill(first, FORGOTTEN), None if p is None else p.masked_fill(first, 0.0)
    return _dense(q, k, v, g, p, z, state=state, at=at)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    p: Tensor | None = None,
    z: Tensor | None = None,
    *,
    state: Tensor | None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:
    (b, t, h, dv), dk, size = v.shape, k.shape[3], 1
    while size < min(t, CHUNK):
        size *= 2
    layout = chunks(b, t, size, None)
    q, k, v, g = (layout.split(x).flatten(0, 1) for x in (q, k, v, g))  # (n, c, k | v), of n = steps b h chunks
    p, z = (None if x is None else layout.split(x).flatten(0, 1) for x in (p, z))
    S = v.new_zeros(b * h, dv, dk) if state is None else state.flatten(0, 1)
    if at is None:
        o, S = _part_by_part(q, k, v, g, p, z, S)
    else:
        o, S, keys, values, before = _chunked(q, k, v, g, p, z, S)
    o, S = layout.join(o.unflatten(0, (-1, h))), None if state is None else S.unflatten(0, (b, h))
    if at is None:
        return o, S
    chunk = (at // size * b + torch.arange(b, device=at.device)[:, None]).flatten()  # (b m)
    keys, values, g, before = (x.unflatten(0, (-1, h))[chunk] for x in (keys, values, g, before))  # (b m, h, ...)
    return o, S, _after(keys, values, g, before, (at % size).repeat(b)).unflatten(0, (b, -1))


def _part_by_part(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, p: Tensor | None, z: Tensor | None, S: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_chunked`, on a CPU a few chunks after the other: what a chunk needs on the way is several times its inputs."""
    whole = q.device.type != "cpu" or torch.compiler.is_compiling()
    size = len(q) if whole else max(1, PART // len(S)) * len(S)
    if size >= len(q):
        return _chunked(q, k, v, g, p, z, S)[:2]
    outputs, each = [], [repeat(None) if x is None else x.split(size) for x in (q, k, v, g, p, z)]
    for q, k, v, g, p, z in list(zip(*each, strict=False)):
        o, S, *_ = _chunked(q, k, v, g, p, z, S)
        outputs.append(o)
    return torch.cat(outputs), S


def _chunked(
    q: Float[Tensor, "n c k"],
    k: Float[Tensor, "n c k"],
    v: Float[Tensor, "n c v"],
    g: Float[Tensor, "n c k"],
    p: Float[Tensor, "n c k"] | None,
    z: Float[Tensor, "n c k"] | None,
    S: Float[Tensor, "r v k"],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs, the last states, the s keys a token that are written with (n, c s, k), what is written (n, c s, v), and the
    states before the chunks (n, v, k)."""
    D, rows, to_end, last = decayed(p, q, z, k, g)
    values, W, M = v, None, None
    if p is None:
        F = v.mT @ to_end[:, :, 0]
    else:
        values, W = _solved(D[:, :, 0, :, 0], v if z is None else D[:, :, 0, :, 1] @ v, rows[:, :, 0])
        M, F = W.mT @ to_end[:, :, 0], values.mT @ to_end[:, :, 0]
        F = F if z is None else F + v.mT @ to_end[:, :, 1]
    before, S = _carry(F, last, M, S)
    if W is not None:
        values = torch.baddbmm(values, W, before.mT)
    if z is not None:
        values = torch.stack([values, v], 2).flatten(1, 2)  # as keys lie: token by token
    o = torch.baddbmm(D[:, :, -1].flatten(2) @ values, rows[:, :, -1], before.mT)
    return o, S, k if z is None else torch.stack([z, k], 2).flatten(1, 2), values, before


class _Solved(torch.autograd.Function):
    """(I - P)^-1 [v p], P read below its diagonal."""

    @staticmethod
    def forward(ctx, P: Tensor, v: Tensor, p: Tensor):
        U, W, *saved = _solution(P, v, p)
        ctx.save_for_backward(*saved)
        ctx.width = v.shape[-1]
        return U, W

    @staticmethod
    @gradient
    def backward(ctx, dU: Tensor, dW: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        dP, Z = _solution_backward(*ctx.saved_tensors, dU, dW)
        return dP, Z[..., : ctx.width], Z[..., ctx.width :]


_solved = one_step(_Solved)


class _Carry(torch.autograd.Function):
    """States before chunks, S <- S (diag(last) + M) + F, and the one after all; r of the n chunks make a step."""

    @staticmethod
    def forward(ctx, F: Tensor, last: Tensor, M: Tensor | None, S: Tensor):
        before, S = _carried(F, last, M, S)
        ctx.save_for_backward(last, M, before)
        return before, S

    @staticmethod
    @gradient
    def backward(ctx, dbefore: Tensor, dS: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        last, M, before = ctx.saved_tensors
        after, dS = _carried_backward(dbefore, last, M, dS)
        return after, (before * after).sum(1), None if M is None else before.mT @ after, dS


_carry = one_step(_Carry)


# What these do, as operators: a graph would have a step for every chunk.


@operator("decayed_solve", cheap=True)
def _solution(P: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U (n, c, v), W (n, c, k), and what the gradient needs."""
    A = torch.neg(P, out=P.new_empty(P.shape))
    X = solve(A, torch.cat([v, p], -1))
    U, W = X.split([v.shape[-1], p.shape[-1]], -1)
    # where decays are strong, W runs down the chunk as their product: stop it before it is subnormal, which is slow
    W.copy_(hardshrink(W, torch.finfo(W.dtype).tiny ** 0.5))
    return U.clone(), W.clone(), A, X


@torch.library.register_fake("plait::decayed_solve")
def _(P, v, p):
    both = (*v.shape[:2], v.shape[2] + p.shape[2])
    return v.new_empty(v.shape), p.new_empty(p.shape), P.new_empty(P.shape), v.new_empty(both)


@operator("decayed_solve_backward")
def _solution_backward(A: Tensor, X: Tensor, dU: Tensor, dW: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients at P, of which nobody reads what is above the diagonal, and at v and p side by side."""
    Z = solve(A, torch.cat([dU, dW], -1), transposed=True)
    return Z @ X.mT, Z


@torch.library.register_fake("plait::decayed_solve_backward")
def _(A, X, dU, dW):
    return A.new_empty(A.shape), X.new_empty(X.shape)


@operator("carry", cheap=True)
def _carried(F: Tensor, last: Tensor, M: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    before, final = F.new_empty(F.shape), S.new_empty(S.shape)
    places = before.split(len(S))
    places[0].copy_(S)
    for here, following, (f, a, m) in zip(
        places, (*places[1:], final), _steps(len(S), F, last[:, None], M), strict=True
    ):
        torch.addcmul(f, here, a, out=following)
        if m is not None:
            following.baddbmm_(here, m)
    return before, final


@torch.library.register_fake("plait::carry")
def _(F, last, M, S):
    return F.new_empty(F.shape), S.new_empty(S.shape)


@operator("carry_backward")
def _carried_backward(dbefore: Tensor, last: Tensor, M: Tensor | None, dS: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states after chunks, and at the first state."""
    after, first = dbefore.new_empty(dbefore.shape), dS.new_empty(dS.shape)
    places = after.split(len(dS))
    places[-1].copy_(dS)
    steps = list(_steps(len(dS), dbefore, last[:, None], M))
    for here, earlier, (d, a, m) in zip(places[::-1], (*places[-2::-1], first), steps[::-1], strict=True):
        torch.addcmul(d, here, a, out=earlier)
        if m is not None:
            earlier.baddbmm_(here, m.mT)
    return after, first


@torch.library.register_fake("plait::carry_backward")
def _(dbefore, last, M, dS):
    return dbefore.new_empty(dbefore.shape), dS.new_empty(dS.shape)


def _steps(r: int, F: Tensor, last: Tensor, M: Tensor | None) -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
    each = (x.split(r) for x in (F, last))
    return zip(*each, repeat(None) if M is None else M.split(r), strict=False)


def _after(
    keys: Float[Tensor, "m h c*s k"],
    values: Float[Tensor, "m h c*s v"],
    g: Float[Tensor, "m h c k"],
    before: Float[Tensor, "m h v k"],
    place: Int[Tensor, " m"],
) -> Float[Tensor, "m h v k"]:
    """The state after one token of each of m chunks."""
    c, chunk = g.shape[2], torch.arange(len(place), device=place.device)
    G = g.double().cumsum(2)
    here = G[chunk, :, place][:, :, None]
    kept = decay_of((here - G).clamp_max(0).to(g.dtype))  # (m, h, c, k)
    kept = kept * (torch.arange(c, device=place.device) <= place[:, None])[:, None, :, None]
    written = (keys.unflatten(2, (c, -1)) * kept[..., None, :]).flatten(2, 3)
    return torch.addcmul(values.mT @ written, before, decay_of(here.to(g.dtype)))
