"""The gated delta rule in chunks (arXiv 2412.06464, section 3.3): matrix products inside a chunk, a loop over chunks.

With a_i the decay from the chunk's start to token i and P_ij from token j to token i, the corrected values of a chunk
solve a unit lower triangular system, (I + A) [U W] = diag(beta) [V diag(a)K] with A_ij = beta_i P_ij k_i . k_j for
j < i. Then

    V' = U - W S^T        O = (P * QK^T) V' + diag(a) Q S^T        S <- a_last S + V'^T diag(a_last / a) K

and only V' and S pass from chunk to chunk. The gradient is written out: it needs one solve with the transposed system
and no more memory than the forward pass, where autograd would keep every scaled copy of q, k and v.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import hardshrink

from plait.ops.chosen import states_at
from plait.ops.decay import chunk_decay, from_pairs, from_sums
from plait.ops.graph import gradient, one_step
from plait.ops.operator import operator
from plait.ops.packing import CHUNK, Packing, chunks, gathered, known, scattered
from plait.ops.triangular import solve


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:
    """Shapes as in `gated_delta`."""
    b, t, h, dv = v.shape
    if packing is not None:
        o, S = _Packed.apply(q, k, v, g, beta, state, packing.cu_seqlens, packing.index, packing.back)
        return o, None if state is None else S
    q, k = (_per_head(x, h) for x in (q, k))
    layout = chunks(b, t, CHUNK, None)
    q, k, v, g, beta = (layout.split(x).flatten(0, 1) for x in (q, k, v, g, beta))  # (n h, c, ...)
    rows = tuple(alive * h for alive in layout.alive)
    S = v.new_zeros(rows[0], dv, k.shape[-1]) if state is None else state.flatten(0, 1)
    if at is not None:
        o, S, _, k, _, _, a, P, _, _, _, _, V, before = _forward(q, k, v, g, beta, S, rows)
        states = states_at(at, b, t, *(x.unflatten(0, (-1, h)) for x in (k, V, a, P, before)))
        return layout.join(o.unflatten(0, (-1, h))), S.unflatten(0, (-1, h)), states
    o, S = _chunked(q, k, v, g, beta, S, rows)
    return layout.join(o.unflatten(0, (-1, h))), None if state is None else S.unflatten(0, (-1, h))


def _per_head(x: Float[Tensor, "b t g k"], heads: int) -> Float[Tensor, "b t h k"]:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor, rows: tuple[int, ...]):
        o, S, *saved = _rows(q, k, v, g, beta, S, rows)
        ctx.save_for_backward(q, k, v, beta, *saved)
        ctx.rows = rows
        return o, S

    @staticmethod
    @gradient
    def backward(ctx, do: Tensor, dS: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_rows_backward(ctx.saved_tensors, do, dS, ctx.rows), None


_chunked = one_step(_Chunked)


def _forward(
    q: Float[Tensor, "n c k"],
    k: Float[Tensor, "n c k"],
    v: Float[Tensor, "n c v"],
    g: Float[Tensor, "n c"],
    beta: Float[Tensor, "n c"],
    S: Float[Tensor, "r v k"],
    rows: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """n chunks of c tokens; `rows[i]` of them, the next ones in order, form step i of the loop over chunks, and what is left
    over is padding. O (n, c, v), the last states, and what `_backward` needs."""
    a, P, to_end = chunk_decay(g)
    L = (k @ k.mT).mul_(P).tril_(-1)
    UW = v.new_empty(*v.shape[:2], v.shape[-1] + k.shape[-1])
    U, W = UW.split([v.shape[-1], k.shape[-1]], -1)
    U.copy_(v).mul_(beta[..., None])
    W.copy_(k).mul_((a * beta)[..., None])
    UW = solve(L * beta[..., None], UW)
    U, W = UW.split([v.shape[-1], k.shape[-1]], -1)
    # where decays are strong, W runs down the chunk as their product: stop it before it is subnormal, which is slow
    W.copy_(hardshrink(W, torch.finfo(W.dtype).tiny ** 0.5))
    keys, last = k * to_end[..., None], a[:, -1, None, None]
    V, before = v.new_empty(v.shape), v.new_empty(len(v), *S.shape[1:])
    before[: rows[0]] = S[: rows[0]]
    first = 0
    for count, following in zip(rows, (*rows[1:], 0), strict=True):
        step, first = slice(first, first + count), first + count
        room = before[first : first + count] if following == count else None  # where the next step looks for it
        torch.baddbmm(U[step], W[step], before[step].mT, alpha=-1, out=V[step])
        after = torch.mul(before[step], last[step], out=room).baddbmm_(V[step].mT, keys[step])
        if room is None:
            S = after if len(S) == count else torch.cat([after, S[count:]])
            before[first : first + following] = S[:following]
    if first < len(v):
        V[first:], before[first:] = 0, 0
    B = (q @ k.mT).mul_(P)
    o = torch.bmm(B, V).baddbmm_(q * a[..., None], before.mT)
    return o, S, q, k, v, beta, a, P, to_end, L, B, UW, V, before


def _backward(saved: Sequence[Tensor], do: Tensor, dS: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Gradients at q, k, v, g, beta and S."""
    q, k, v, beta, a, P, to_end, L, B, UW, V, before = saved
    Z = torch.empty_like(UW)
    Zv, Zk = Z.split([v.shape[-1], k.shape[-1]], -1)
    dV, dafter, dS = _through_time(rows, do, dS, q, k, a, to_end, B, UW)
    dq, dk, dlogP, dG = _output_gradients(do, q, k, a, P, to_end, B, V, before, dafter)
    Zv.copy_(dV)
    Zk.copy_(torch.bmm(dV, before)).neg_()
    Z = solve(L * beta[..., None], Z, transposed=True)
    Zv, Zk = Z.split([v.shape[-1], k.shape[-1]], -1)
    dA = torch.bmm(Z, UW.mT).neg_()
    along_k = vecdot(Zk, k) * a
    dLL = dA * L
    dbeta = dLL.sum(-1) + vecdot(Zv, v) + along_k
    dlogP.addcmul_(dLL, beta[..., None])
    dG += beta * along_k
    dKK = dA.mul_(beta[..., None]).mul_(P).tril_(-1)
    dk.baddbmm_(dKK, k).baddbmm_(dKK.mT, k).addcmul_(Zk, (a * beta)[..., None])
    dg = from_sums(dG, k.dtype).add_(from_pairs(dlogP))
    return dq, dk, Zv * beta[..., None], dg, dbeta, dS


def _through_time(
    rows: tuple[int, ...],
    do: Tensor,
    dS: Tensor,
    q: Tensor,
    k: Tensor,
    a: Tensor,
    to_end: Tensor,
    B: Tensor,
    UW: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of V' and of the state after each chunk, and of the first state: the loop run backwards."""
    dV = torch.bmm(B.mT, do)  # (n, c, v)
    dbefore = torch.bmm(do.mT, q * a[..., None])  # (n, v, k)
    dafter = torch.empty_like(dbefore)
    keys, last, W = k * to_end[..., None], a[:, -1, None, None], UW[..., do.shape[-1] :]
    first = sum(rows)
    if first < len(do):
        dafter[first:] = 0
    dafter[first - rows[-1] : first] = dS[: rows[-1]]
    for count, following in zip(rows[::-1], (*rows[-2::-1], 0), strict=True):
        first -= count
        step = slice(first, first + count)
        room = dafter[first - count : first] if following == count else None
        dV[step].baddbmm_(keys[step], dafter[step].mT)
        live = torch.addcmul(dbefore[step], dafter[step], last[step], out=room)
        live.baddbmm_(dV[step].mT, W[step], alpha=-1)
        if room is None:
            dS = live if len(dS) == count else torch.cat([live, dS[count:]])
            dafter[first - following : first] = dS[:following]
    return dV, dafter, dS


def _output_gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    a: Tensor,
    P: Tensor,
    to_end: Tensor,
    B: Tensor,
    V: Tensor,
    before: Tensor,
    dafter: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What O and the states after chunks give to q, k, log P and G."""
    read, written = torch.bmm(do, before), torch.bmm(V, dafter)  # (n, c, k)
    dB = torch.bmm(do, V.mT)
    into_end = (vecdot(k, written) * to_end).double()
    dG = vecdot(q, read) * a - into_end
    dG[:, -1] += into_end.sum(-1) + a[:, -1] * vecdot(before.flatten(1), dafter.flatten(1))
    dlogP = dB * B
    dB.mul_(P)
    dq = read.mul_(a[..., None]).baddbmm_(dB, k)
    dk = written.mul_(to_end[..., None]).baddbmm_(dB.mT, q)
    return dq, dk, dlogP, dG


# --- the same as operators, so that a graph is no longer for a longer sequence


@operator("delta_rows", cheap=True)
def _rows(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """O (n, c, v), the last states, and what the gradient needs beside q, k, v and beta."""
    o, S, _, _, _, _, *saved = _forward(q, k, v, g, beta, S, tuple(rows))
    return [o, S, *saved]


@torch.library.register_fake("plait::delta_rows")
def _(q, k, v, g, beta, S, rows):
    (n, c, dk), dv = q.shape, v.shape[2]
    square, tokens = (n, c, c), (n, c)
    saved = [tokens, square, tokens, square, square, (n, c, dv + dk), v.shape, (n, dv, dk)]
    return [v.new_empty(v.shape), S.new_empty(S.shape), *(v.new_empty(shape) for shape in saved)]


@operator("delta_rows_backward")
def _rows_backward(saved: Sequence[Tensor], do: Tensor, dS: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Gradients at q, k, v, g, beta and S."""
    return list(_backward(saved, do, dS, tuple(rows)))


@torch.library.register_fake("plait::delta_rows_backward")
def _(saved, do, dS, rows):
    q, k, v, beta, *_ = saved
    return [x.new_empty(x.shape) for x in (q, k, v, beta, beta, dS)]


# --- documents: as operators too, so that a compiled graph holds no document's length


class _Packed(torch.autograd.Function):
    """Tokens (1, t, ...), a state per document (n, h, v, k) or none, and of the packing its offsets, chunks and way back."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, cu_seqlens, index, back):
        o, S, *saved = _packed(q, k, v, g, beta, state, cu_seqlens, index, back)
        ctx.save_for_backward(cu_seqlens, index, back, *saved)
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.has_state = q.shape[2], state is not None
        return o, S

    @staticmethod
    @gradient
    def backward(ctx, do, dS):  # pyright: ignore[reportIncompatibleMethodOverride]
        cu_seqlens, index, back, *saved = ctx.saved_tensors
        *gradients, dS = _pull(
            do, dS if ctx.has_state else None, cu_seqlens, index, back, saved, ctx.groups, ctx.has_state
        )
        return *gradients, dS if ctx.has_state else None, None, None, None


@operator("delta")
def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor,
    index: Tensor,
    back: Tensor,
) -> list[Tensor]:
    """O (1, t, h, v), the last states (n, h, v, k), nothing in them where there was no state, and what the gradient needs."""
    h, dv, dk = *v.shape[2:], k.shape[3]
    layout = known(cu_seqlens, v.device).chunks(index.shape[1])
    q, k, v, g, beta = (_split(x, index) for x in (_per_head(q, h), _per_head(k, h), v, g, beta))
    start = v.new_zeros(layout.alive[0] * h, dv, dk) if state is None else layout.sort(state).flatten(0, 1)
    o, S, *saved = _forward(q, k, v, g, beta, start, tuple(alive * h for alive in layout.alive))
    last = v.new_empty(0, h, dv, dk) if state is None else layout.unsort(S.unflatten(0, (-1, h)))
    return [_join(o, h, back), last, *saved]


@torch.library.register_fake("plait::delta")
def _(q, k, v, g, beta, state, cu_seqlens, index, back):
    h, dv, dk = *v.shape[2:], k.shape[3]
    n, c = index.shape[0] * h, index.shape[1]
    keys, values, square, tokens = (n, c, dk), (n, c, dv), (n, c, c), (n, c)
    shapes = [keys, keys, values, tokens, tokens, square, tokens, square, square, (n, c, dv + dk), values, (n, dv, dk)]
    last = v.new_empty(0, h, dv, dk) if state is None else torch.empty_like(state)
    return [v.new_empty(v.shape), last, *(v.new_empty(shape) for shape in shapes)]


@operator("delta_backward")
def _pull(
    do: Tensor | None,
    dS: Tensor | None,
    cu_seqlens: Tensor,
    index: Tensor,
    back: Tensor,
    saved: Sequence[Tensor],
    groups: int,
    has_state: bool,
) -> list[Tensor]:
    """Gradients at q, k (1, t, groups, k), v, g, beta and the states, nothing in them where there were none."""
    v, before = saved[2], saved[-1]
    h = len(v) // len(index)
    layout = known(cu_seqlens, v.device).chunks(index.shape[1])
    do = torch.zeros_like(v) if do is None else _split(do, index)
    dS = v.new_zeros(layout.alive[0] * h, *before.shape[1:]) if dS is None else layout.sort(dS).flatten(0, 1)
    *gradients, dS = _backward(saved, do, dS, tuple(alive * h for alive in layout.alive))
    dq, dk, *rest = (_join(x, h, back) for x in gradients)
    if groups != h:
        dq, dk = (x.unflatten(2, (groups, -1)).sum(3) for x in (dq, dk))
    return [dq, dk, *rest, layout.unsort(dS.unflatten(0, (-1, h))) if has_state else dS.new_empty(0)]


@torch.library.register_fake("plait::delta_backward")
def _(do, dS, cu_seqlens, index, back, saved, groups, has_state):
    q, k, v, beta, *_, before = saved
    t, h = back.shape[0], v.shape[0] // index.shape[0]
    keys = [x.new_empty(1, t, groups, x.shape[2]) for x in (q, k)]
    rest = [x.new_empty(1, t, h, *x.shape[2:]) for x in (v, beta, beta)]
    first = before.new_empty(cu_seqlens.shape[0] - 1, h, *before.shape[1:]) if has_state else v.new_empty(0)
    return [*keys, *rest, first]


def _split(x: Float[Tensor, "1 t h *k"], index: Tensor) -> Float[Tensor, "n*h c *k"]:
    return gathered(x, index).flatten(0, 1)


def _join(y: Float[Tensor, "n*h c *k"], heads: int, back: Tensor) -> Float[Tensor, "1 t h *k"]:
    return scattered(y.unflatten(0, (-1, heads)), back)
