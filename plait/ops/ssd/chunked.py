"""The scalar-decay recurrence in chunks (arXiv 2405.21060, section 6): attention-like products inside a chunk, and a
loop over chunks that only scales and adds states.

With a_i the decay from the chunk's start to token i and P_ij from token j to token i,

    O = (P * QK^T) V + diag(a) Q S^T        S <- a_last S + V^T diag(a_last / a) K

Heads of one group share q and k, so their products with states are one. The gradient is written out, as for the delta
rule: autograd would keep every scaled copy of v and fill zeros around each step of the loop.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vecdot

from plait.ops.chosen import states_at
from plait.ops.decay import chunk_decay, from_pairs, from_sums
from plait.ops.graph import gradient, one_step
from plait.ops.operator import operator
from plait.ops.packing import CHUNK, Packing, chunks, gathered, known, scattered


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:
    """Shapes as in `ssd`."""
    b, t, h, dv = v.shape
    if packing is not None:
        o, S = _Packed.apply(q, k, v, g, state, packing.cu_seqlens, packing.index, packing.back)
        return o, None if state is None else S
    layout = chunks(b, t, CHUNK, None)
    q, k, v, g = (layout.split(x) for x in (q, k, v, g))  # (n, g, c, k), (n, h, c, v), (n, h, c)
    S = v.new_zeros(layout.alive[0], h, dv, k.shape[-1]) if state is None else state
    if at is not None:
        o, S, _, k, v, a, P, _, _, before, _ = _forward(q, k, v, g, S, layout.alive)
        return layout.join(o), S, states_at(at, b, t, k, v, a, P, before)
    o, S = _chunked(q, k, v, g, S, layout.alive)
    return layout.join(o), None if state is None else S


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor, rows: tuple[int, ...]):
        o, S, *saved = _forward(q, k, v, g, S, rows)
        ctx.save_for_backward(*saved)
        ctx.rows = rows
        return o, S

    @staticmethod
    @gradient
    def backward(ctx, do: Tensor, dS: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_backward(ctx.saved_tensors, do, dS, ctx.rows), None


_chunked = one_step(_Chunked)


def _forward(
    q: Float[Tensor, "n g c k"],
    k: Float[Tensor, "n g c k"],
    v: Float[Tensor, "n h c v"],
    g: Float[Tensor, "n h c"],
    S: Float[Tensor, "r h v k"],
    rows: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """n chunks of c tokens; `rows[i]` of them, the next ones in order, form step i of the loop over chunks, and what is left
    over is padding. O (n, h, c, v), the last states, and what `_backward` needs."""
    a, P, to_end = chunk_decay(g)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    groups = q.shape[1]
    written = (_grouped(v * to_end[..., None], groups).mT @ k.flatten(0, 1)).view(len(v), *S.shape[1:])
    before = torch.empty_like(written)
    before[: rows[0]] = S[: rows[0]]
    first = 0
    for count, following in zip(rows, (*rows[1:], 0), strict=True):
        step, first = slice(first, first + count), first + count
        room = before[first : first + count] if following == count else None  # where the next step looks for it
        after = torch.addcmul(written[step], before[step], a[step, :, -1, None, None], out=room)
        if room is None:
            S = after if len(S) == count else torch.cat([after, S[count:]])
            before[first : first + following] = S[:following]
    if first < len(before):
        before[first:] = 0
    B = _per_head(q @ k.mT, P)
    read = q.flatten(0, 1) @ before.view(len(v) * groups, -1, k.shape[-1]).mT  # (n g, c, h/g v)
    o = (B.flatten(0, 1) @ v.flatten(0, 1)).view(v.shape).addcmul_(_ungrouped(read, v), a[..., None])
    return o, S, q, k, v, a, P, to_end, B, before, read


def _backward(saved: Sequence[Tensor], do: Tensor, dS: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Gradients at q, k, v, g and S."""
    q, k, v, a, P, to_end, B, before, read = saved
    n, groups, dk = len(v), q.shape[1], k.shape[-1]
    q_flat, k_flat, do = q.flatten(0, 1), k.flatten(0, 1), do.contiguous()
    do_read = _grouped(do * a[..., None], groups)  # (n g, c, h/g v)
    dafter, dS = _through_time(rows, (do_read.mT @ q_flat).view(before.shape), dS, a)
    states, dstates = (x.view(n * groups, -1, dk) for x in (before, dafter))

    from_end = _ungrouped(k_flat @ dstates.mT, v)  # (n, h, c, v)
    into_end = (vecdot(v, from_end) * to_end).double()
    dB = (do.flatten(0, 1) @ v.flatten(0, 1).mT).view(B.shape)
    dG = vecdot(do, _ungrouped(read, v)) * a - into_end
    dG[..., -1] += into_end.sum(-1) + a[..., -1] * vecdot(before.flatten(2), dafter.flatten(2))

    dg = from_sums(dG, v.dtype).add_(from_pairs(dB * B))
    dqk = dB.mul_(P).unflatten(1, (groups, -1)).sum(2).flatten(0, 1)  # (n g, c, c)
    dq = (do_read @ states).baddbmm_(dqk, k_flat)
    dk_ = (_grouped(v * to_end[..., None], groups) @ dstates).baddbmm_(dqk.mT, q_flat)
    dv = (B.flatten(0, 1).mT @ do.flatten(0, 1)).view(v.shape).addcmul_(from_end, to_end[..., None])
    return dq.view(q.shape), dk_.view(k.shape), dv, dg, dS


def _through_time(rows: tuple[int, ...], dbefore: Tensor, dS: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the state after each chunk, and of the first state: the loop run backwards."""
    dafter = torch.empty_like(dbefore)
    first = sum(rows)
    if first < len(dafter):
        dafter[first:] = 0
    dafter[first - rows[-1] : first] = dS[: rows[-1]]
    for count, following in zip(rows[::-1], (*rows[-2::-1], 0), strict=True):
        first -= count
        step = slice(first, first + count)
        room = dafter[first - count : first] if following == count else None
        live = torch.addcmul(dbefore[step], dafter[step], a[step, :, -1, None, None], out=room)
        if room is None:
            dS = live if len(dS) == count else torch.cat([live, dS[count:]])
            dafter[first - following : first] = dS[:following]
    return dafter, dS


def _grouped(x: Float[Tensor, "n h c v"], groups: int) -> Float[Tensor, "n*g c h/g*v"]:
    """Heads of a group side by side."""
    return x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3).flatten(0, 1)


def _ungrouped(x: Float[Tensor, "n*g c h/g*v"], like: Float[Tensor, "n h c v"]) -> Float[Tensor, "n h c v"]:
    n, h, c, v = like.shape
    return x.view(n, -1, c, h * n // len(x), v).transpose(2, 3).reshape(n, h, c, v)


def _per_head(qk: Float[Tensor, "n g c c"], P: Float[Tensor, "n h c c"]) -> Float[Tensor, "n h c c"]:
    return (qk[:, :, None] * P.unflatten(1, (qk.shape[1], -1))).flatten(1, 2)


# --- documents: the same as operators, so that a compiled graph holds no document's length


class _Packed(torch.autograd.Function):
    """Tokens (1, t, ...), a state per document (n, h, v, k) or none, and of the packing its offsets, chunks and way back."""

    @staticmethod
    def forward(ctx, q, k, v, g, state, cu_seqlens, index, back):
        o, S, *saved = _packed(q, k, v, g, state, cu_seqlens, index, back)
        ctx.save_for_backward(cu_seqlens, index, back, *saved)
        ctx.set_materialize_grads(False)
        ctx.has_state = state is not None
        return o, S

    @staticmethod
    @gradient
    def backward(ctx, do, dS):  # pyright: ignore[reportIncompatibleMethodOverride]
        cu_seqlens, index, back, *saved = ctx.saved_tensors
        *gradients, dS = _pull(do, dS if ctx.has_state else None, cu_seqlens, index, back, saved, ctx.has_state)
        return *gradients, dS if ctx.has_state else None, None, None, None


@operator("ssd")
def _packed(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, cu_seqlens: Tensor, index: Tensor, back: Tensor
) -> list[Tensor]:
    """O (1, t, h, v), the last states (n, h, v, k), nothing in them where there was no state, and what the gradient needs."""
    layout = known(cu_seqlens, v.device).chunks(index.shape[1])
    q, k, v, g = (gathered(x, index) for x in (q, k, v, g))
    start = v.new_zeros(layout.alive[0], *v.shape[1:2], v.shape[3], k.shape[3]) if state is None else layout.sort(state)
    o, S, *saved = _forward(q, k, v, g, start, layout.alive)
    last = S.new_empty(0, *S.shape[1:]) if state is None else layout.unsort(S)
    return [scattered(o, back), last, *saved]


@torch.library.register_fake("plait::ssd")
def _(q, k, v, g, state, cu_seqlens, index, back):
    (n, c), groups, dk, h, dv = index.shape, *q.shape[2:], *v.shape[2:]
    keys, values, tokens, square = (n, groups, c, dk), (n, h, c, dv), (n, h, c), (n, h, c, c)
    read = n * groups, c, h // groups * dv
    shapes = keys, keys, values, tokens, square, tokens, square, (n, h, dv, dk), read
    last = v.new_empty(0, h, dv, dk) if state is None else torch.empty_like(state)
    return [v.new_empty(v.shape), last, *(v.new_empty(shape) for shape in shapes)]


@operator("ssd_backward")
def _pull(
    do: Tensor | None,
    dS: Tensor | None,
    cu_seqlens: Tensor,
    index: Tensor,
    back: Tensor,
    saved: Sequence[Tensor],
    has_state: bool,
) -> list[Tensor]:
    """Gradients at q, k, v, g (1, t, ...) and the states, nothing in them where there were none."""
    v, before = saved[2], saved[7]
    layout = known(cu_seqlens, v.device).chunks(index.shape[1])
    do = torch.zeros_like(v) if do is None else gathered(do, index)
    dS = before.new_zeros(layout.alive[0], *before.shape[1:]) if dS is None else layout.sort(dS)
    *gradients, dS = _backward(saved, do, dS, layout.alive)
    first = layout.unsort(dS) if has_state else dS.new_empty(0)
    return [*(scattered(x, back) for x in gradients), first]


@torch.library.register_fake("plait::ssd_backward")
def _(do, dS, cu_seqlens, index, back, saved, has_state):
    q, k, v, a, _, _, _, before, _ = saved
    flat = [x.new_empty(1, back.shape[0], x.shape[1], *x.shape[3:]) for x in (q, k, v, a)]
    return [*flat, before.new_empty(cu_seqlens.shape[0] - 1, *before.shape[1:]) if has_state else v.new_empty(0)]
