"""Recurrences with a decay per key channel, in chunks of 64 tokens, as Triton kernels: S <- S diag(a) + v k^T (gla), and, where
what is written is corrected by what the state answers already, S <- S diag(a) (I - b k k^T) + b v k^T (Kimi delta attention).

With G the sums of log decays from the chunk's start, k' = k e^G, k" = k e^(G_last - G), S the state before the chunk,
B_ij = sum_c q_ic k_jc e^(G_ic - G_jc) for j <= i, and A_ij = b_i sum_c k_ic k_jc e^(G_ic - G_jc) for j < i,

    V' = (I + A)^-1 R,  R = b (V - K' S^T)        (gla: V' = V)
    O = B V' + Q' S^T                              S <- S diag(e^G_last) + V'^T K"

(arXiv 2312.06635, section 4; arXiv 2510.26692, section 3). Differences G_i - G_j are never split into G_i and -G_j, whose
exponent may be anything: a chunk is halved again and again, as in `plait.ops.gla.decayed`, and where tokens i of a later half
meet tokens j of the earlier one, the decay is that from the middle to i times that from j to the middle, both at most 1. Sums
of logs are products with matrices of 0 and 1, so none is the difference of two large ones either.

`prepare` makes Q', K', K", B and (I + A)^-1 of every chunk, all at once; `forward` goes through the chunks of one sequence,
head and block of values; `backward` does so in reverse; `gradients` gives what every chunk's inputs get from that, all chunks
and blocks of channels at once. States and sums are float32; numbers of products are those of q, k and v.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
# (it reads kernels as Python, in which triton's functions only raise)

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.ops.chunks_triton import (
    BV,
    C,
    counts,
    inverse,
    keep,
    matrix,
    numbers,
    rows_of,
    strides,
    tile,
    times,
    tokens_of,
)
from plait.ops.launch import kernel, launch
from plait.ops.numbers import power_of_two

if TYPE_CHECKING:
    from plait.ops.chunks_gpu import Plan

LEAST = tl.constexpr(-40.0)  # the log of a decay that is 0 beside a term without one: e^-40 is 4e-18
LOG2_E = tl.constexpr(1.4426950408889634)
LEVELS = tl.constexpr(C.bit_length() - 1)
# channels of keys at a time or in a program where not all are needed at once, values of a program, and how it is compiled
OPTIONS = {
    "prepare": {"BK": 64, "num_warps": 4, "num_stages": 1},
    "forward": {"BV": BV, "num_warps": 4, "num_stages": 2},
    "backward": {"BV": BV, "num_warps": 4, "num_stages": 2},
    "gradients": {"BK": 64, "BV": BV, "num_warps": 8, "num_stages": 1},
}
NARROWEST = 64  # channels of keys at a time: of 16, in float32, Triton 3.6 made gradients that read where nothing is
LARGE = 256  # bytes of a token's keys above which the loops over chunks hold one at a time, by more warps


@triton.jit
def logs(g, first, count, stride, d, D: tl.constexpr, C: tl.constexpr):
    """Log decays of a chunk, and the two parts of 11 bits that tensor cores sum exactly."""
    x = tl.maximum(tile(g, first, count, stride, d, D, C).to(tl.float32), LEAST)
    high = x.to(tl.float16)
    return x, high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def decay(among, high, low):
    """exp of the sums of log decays over the tokens that each row of `among` (tokens, tokens) is true for.

    Scaled before they are added, neither product comes to the other: see `middle`.
    """
    among = among.to(tl.float16)
    return tl.exp2(tl.dot(among, high) * LOG2_E + tl.dot(among, low) * LOG2_E)


@triton.jit
def halves(level, C: tl.constexpr):
    """Where blocks of 2^level tokens meet two and two: whether a token is in the later one, and the pairs of a later and an
    earlier one."""
    i, j = tl.arange(0, C)[:, None] >> level, tl.arange(0, C)[None, :] >> level
    late = i % 2 == 1
    return late, late & (j + 1 == i)


@triton.jit
def middle(level, high, low, C: tl.constexpr):
    """The decay between each token and the middle of its two blocks of 2^level; where the first is the chunk, to its end.

    It is always that of the next level that is made: where a product's result comes to another product in the same turn of a
    loop, Triton lays it out over half of eight warps, twice.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return decay(((i >> level) == (j >> level)) & (((i >> level) % 2 == 1) == (j <= i)), high, low)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@kernel
def prepare(
    q, k, g, beta, read, asked, kept, last, B, T, table, tokens, scale, q_t, q_h, k_t, k_h, g_t, g_h, b_t, b_h,
    H: tl.constexpr, TIMES: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program makes Q', K', K", e^G_last, B and (I + A)^-1 of one chunk of one head; q is scaled in it."""
    head, chunk = tl.program_id(0) % H, tl.program_id(0) // H
    first, count = tokens_of(chunk, table, tokens, C)
    there = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    dtype: tl.constexpr = q.dtype.element_ty
    scores, alike = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for at in range(0, K, BK):
        d = at + tl.arange(0, BK)
        queries = tile(q + head // TIMES * q_h, first, count, q_t, d, K, C).to(tl.float32) * scale
        keys = tile(k + head // TIMES * k_h, first, count, k_t, d, K, C).to(tl.float32)
        x, high, low = logs(g + head * g_h, first, count, g_t, d, K, C)
        tl.store(last + there * K + d, tl.exp(tl.sum(x, 0)), mask=d < K)
        scores += tl.where(i == j, tl.sum(queries * keys, 1)[:, None], 0.0)
        a = tl.where(i % 2 == 1, tl.exp(x), 1.0)
        for level in range(0, LEVELS):
            late, meet = halves(level, C)
            early = tl.trans(tl.where(late, 0.0, keys * a).to(dtype))
            scores += tl.where(meet, times(tl.where(late, queries * a, 0.0).to(dtype), early), 0.0)
            if T is not None:
                alike += tl.where(meet, times(tl.where(late, keys * a, 0.0).to(dtype), early), 0.0)
            a = middle(level + 1, high, low, C)
        keep(kept + head * K, first, count, H * K, d, K, C, keys * a)
        a = decay(i >= j, high, low)
        keep(read + head * K, first, count, H * K, d, K, C, queries * a)
        if asked is not None:
            keep(asked + head * K, first, count, H * K, d, K, C, keys * a)
    place = there * C * C + i * C + j
    tl.store(B + place, scores.to(dtype))
    if T is not None:
        b = numbers(beta + head * b_h, first, count, b_t, C)
        tl.store(T + place, inverse(alike * b[:, None], C).to(dtype))


@kernel
def forward(
    read, asked, kept, last, B, T, v, beta, S0, o, S1, before, written, cu, base, tokens, v_t, v_h, b_t, b_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program goes through the chunks of one head of one sequence, with BV of its values."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    head, n = pid // blocks % H, pid // (blocks * H)
    first, length, chunk = rows_of(n, cu, base, tokens, C)
    c, d, e = tl.arange(0, C), tl.arange(0, BK), pid % blocks * BV + tl.arange(0, BV)
    dtype: tl.constexpr = o.dtype.element_ty
    inside = (d < K)[:, None] & (e < V)[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    state = (n.to(tl.int64) * H + head) * V * K
    if S0 is not None:  # (V, K)
        S += tl.load(S0 + state + e[None, :] * K + d[:, None], mask=inside, other=0.0)
    for start in range(0, length, C):
        at, count = first + start, tl.minimum(length - start, C)
        there = (chunk + start // C).to(tl.int64) * H + head
        queries = tile(read + head * K, at, count, H * K, d, K, C)
        keys = tile(kept + head * K, at, count, H * K, d, K, C)
        values = tile(v + head * v_h, at, count, v_t, e, V, C)
        held = S.to(dtype)
        if before is not None:
            tl.store(before + there * K * V + d[:, None] * V + e[None, :], held, mask=inside)
        if beta is not None:
            b = numbers(beta + head * b_h, at, count, b_t, C)
            answer = times(tile(asked + head * K, at, count, H * K, d, K, C), held)
            R = b[:, None] * (values.to(tl.float32) - answer)
            values = times(matrix(T, there * C * C, c, c, C, C), R.to(dtype)).to(dtype)
            if written is not None:
                keep(written + head * V, at, count, H * V, e, V, C, values)
        out = times(queries, held) + times(matrix(B, there * C * C, c, c, C, C), values)
        keep(o + head * V, at, count, H * V, e, V, C, out)
        a = tl.load(last + there * K + d, mask=d < K, other=0.0)
        S = S * a[:, None] + times(tl.trans(keys), values)
    if S1 is not None:
        tl.store(S1 + state + e[None, :] * K + d[:, None], S, mask=inside)


@kernel
def backward(
    read, asked, kept, last, B, T, beta, do, dS1, dS0, after, corrected, dv, cu, base, tokens, b_t, b_h, o_t, o_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The same, from the last chunk to the first: the gradient of the state after each, of R, and of V."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    head, n = pid // blocks % H, pid // (blocks * H)
    first, length, chunk = rows_of(n, cu, base, tokens, C)
    c, d, e = tl.arange(0, C), tl.arange(0, BK), pid % blocks * BV + tl.arange(0, BV)
    dtype: tl.constexpr = dv.dtype.element_ty
    inside = (d < K)[:, None] & (e < V)[None, :]
    dS = tl.zeros([BK, BV], tl.float32)
    state = (n.to(tl.int64) * H + head) * V * K
    if dS1 is not None:
        dS += tl.load(dS1 + state + e[None, :] * K + d[:, None], mask=inside, other=0.0)
    chunks = (length + C - 1) // C
    for step in range(0, chunks):
        start = (chunks - 1 - step) * C
        at, count = first + start, tl.minimum(length - start, C)
        there = (chunk + start // C).to(tl.int64) * H + head
        queries = tile(read + head * K, at, count, H * K, d, K, C)
        keys = tile(kept + head * K, at, count, H * K, d, K, C)
        gradient = tile(do + head * o_h, at, count, o_t, e, V, C)
        held = dS.to(dtype)
        tl.store(after + there * K * V + d[:, None] * V + e[None, :], held, mask=inside)
        dV = times(tl.trans(matrix(B, there * C * C, c, c, C, C)), gradient) + times(keys, held)
        a = tl.load(last + there * K + d, mask=d < K, other=0.0)
        dS = dS * a[:, None] + times(tl.trans(queries), gradient)
        if beta is not None:
            b = numbers(beta + head * b_h, at, count, b_t, C)
            dV = times(tl.trans(matrix(T, there * C * C, c, c, C, C)), dV.to(dtype))
            keep(corrected + head * V, at, count, H * V, e, V, C, dV)
            dV *= b[:, None]
            dS -= times(tl.trans(tile(asked + head * K, at, count, H * K, d, K, C)), dV.to(dtype))
        keep(dv + head * V, at, count, H * V, e, V, C, dV)
    if dS0 is not None:
        tl.store(dS0 + state + e[None, :] * K + d[:, None], dS, mask=inside)


@kernel
def gradients(
    q, k, v, g, beta, do, written, corrected, before, after, dq, dk, dg, dbeta, table, tokens, number, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, g_t, g_h, b_t, b_h, o_t, o_h,
    H: tl.constexpr, TIMES: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """A program gives the gradients of BK channels of one chunk of one head: dq and dk of each head that reads the same q and
    k, and of each block of channels what it adds to dbeta (blocks, number of tokens, heads).

    The gradient of G is a sum of what products were taken of times what comes back to that, row by row and column by column, so
    that where a pair of tokens lies on one side of a decay its two shares are the same and leave nothing of their rounding.
    """
    blocks: tl.constexpr = (K + BK - 1) // BK
    block, head, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks % H, tl.program_id(0) // (blocks * H)
    first, count = tokens_of(chunk, table, tokens, C)
    there = (tl.program_id(0) // blocks).to(tl.int64) * K * V
    i, j, d = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :], block * BK + tl.arange(0, BK)
    dtype: tl.constexpr = q.dtype.element_ty
    dread, dkept = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    dB, carried = tl.zeros([C, C], tl.float32), tl.zeros([BK], tl.float32)
    if beta is not None:
        dasked, dA, db = tl.zeros([C, BK], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for at in range(0, V, BV):
        e = at + tl.arange(0, BV)
        gradient = tile(do + head * o_h, first, count, o_t, e, V, C)
        given = tile(v + head * v_h, first, count, v_t, e, V, C)
        values = given if beta is None else tile(written + head * V, first, count, H * V, e, V, C)
        S, dS = matrix(before, there, d, e, K, V), matrix(after, there, d, e, K, V)
        dread += times(gradient, tl.trans(S))
        dkept += times(values, tl.trans(dS))
        dB += times(gradient, tl.trans(values))
        carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        if beta is not None:
            dR = tile(corrected + head * V, first, count, H * V, e, V, C)
            dasked -= times(dR, tl.trans(S))
            dA -= times(dR, tl.trans(values))
            db += tl.sum(dR.to(tl.float32) * given.to(tl.float32), 1)

    queries = tile(q + head // TIMES * q_h, first, count, q_t, d, K, C).to(tl.float32) * scale
    keys = tile(k + head // TIMES * k_h, first, count, k_t, d, K, C).to(tl.float32)
    x, high, low = logs(g + head * g_h, first, count, g_t, d, K, C)
    own = tl.sum(tl.where(i == j, dB, 0.0), 1)[:, None]
    dQ, dK, dG = own * keys, own * queries, tl.zeros([C, BK], tl.float32)
    dB = dB.to(dtype)
    if beta is not None:
        b = numbers(beta + head * b_h, first, count, b_t, C)[:, None]
        db = tl.where(block == 0, db, 0.0)  # what all channels together give, one block does
        dA, dasks = dA.to(dtype), tl.zeros([C, BK], tl.float32)  # of a row of A and of K' S, before strengths
    a = tl.where(i % 2 == 1, tl.exp(x), 1.0)
    for level in range(0, LEVELS):
        late, meet = halves(level, C)
        early, asks = tl.where(late, 0.0, keys * a).to(dtype), tl.where(late, queries * a, 0.0).to(dtype)
        share = tl.where(meet, dB, 0.0)
        dlate, dearly = times(share, early), times(tl.trans(share), asks)
        dG += asks.to(tl.float32) * dlate
        dQ += dlate * a
        if beta is not None:
            solves, share = tl.where(late, keys * a * b, 0.0).to(dtype), tl.where(meet, dA, 0.0)
            dlate = times(share, early)
            dearly += times(tl.trans(share), solves)
            dG += solves.to(tl.float32) * dlate
            dasks += dlate * a
        dG -= early.to(tl.float32) * dearly
        dK += dearly * a
        a = middle(level + 1, high, low, C)
    into_end = rounded(keys * a, dtype) * dkept
    dG += tl.where(i == C - 1, (tl.sum(into_end, 0) + tl.exp(tl.sum(x, 0)) * carried)[None, :], 0.0) - into_end
    dK += dkept * a
    a = decay(i >= j, high, low)
    dG += rounded(queries * a, dtype) * dread
    dQ += dread * a
    if beta is not None:
        dG += b * rounded(keys * a, dtype) * dasked
        dasks += dasked * a
        db += tl.sum(keys * dasks, 1)
        dK += b * dasks
    keep(dq + head * K, first, count, H * K, d, K, C, dQ * scale)
    keep(dk + head * K, first, count, H * K, d, K, C, dK)
    # g of a token is in the sums of all later ones, so its gradient is what they get
    dG += tl.sum(dG, 0)[None, :] - tl.cumsum(dG, 0)
    keep(dg + head * K, first, count, H * K, d, K, C, tl.where(x > LEAST, dG, 0.0))
    if beta is not None:
        c = tl.arange(0, C)
        tl.store(dbeta + (block.to(tl.int64) * number + first + c) * H + head, db, mask=c < count)


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    state: Tensor | None,
    o: Tensor,
    last: Tensor,
    before: Tensor | None,
    T: Tensor | None,
    written: Tensor | None,
    plan: "Plan | None",
    scale: float,
) -> None:
    """Shapes as in `plait.ops.chunks_gpu`."""
    n, chunks = counts(v, plan)
    made, loop = _prepared(q, k, g, beta, T, chunks, v.shape[1], plan, scale), _loop("forward", k, v)
    cuts, base = (None, None) if plan is None else plan[:2]
    launch(
        forward, n * _programs(loop), *made, T, v, beta, state, o, last if state is not None else None, before, written,
        cuts, base, v.shape[1], *strides(v, v if beta is None else beta), **loop,
    )  # fmt: skip


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    do: Tensor,
    dlast: Tensor | None,
    before: Tensor,
    T: Tensor,
    written: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dg: Tensor,
    dbeta: Tensor | None,
    first: Tensor,
    plan: "Plan | None",
    scale: float,
) -> None:
    """What the loop reads is made again: kept, it would be more than all that is."""
    n, chunks = counts(v, plan)
    made, loop = _prepared(q, k, g, beta, None, chunks, v.shape[1], plan, scale), _loop("backward", k, v)
    cuts, base, table = (None, None, None) if plan is None else plan
    after, b = torch.empty_like(before), v if beta is None else beta
    corrected = None if beta is None else torch.empty_like(dv)
    launch(
        backward, n * _programs(loop), *made, T, beta, do, dlast, first if len(first) else None, after, corrected, dv,
        cuts, base, v.shape[1], *strides(b, do), **loop,
    )  # fmt: skip
    sizes = _blocks("gradients", k, v)
    blocks = -(-sizes["K"] // sizes["BK"])
    parts = None if dbeta is None else torch.empty(blocks, *dbeta.shape, device=dbeta.device)
    launch(
        gradients, chunks * sizes["H"] * blocks, q, k, v, g, beta, do, written, corrected, before, after, dq, dk, dg, parts,
        table, v.shape[1], v.shape[0] * v.shape[1], scale, *strides(q, k, v, g, b, do), V=v.shape[3], **sizes,
    )  # fmt: skip
    if parts is not None:
        torch.sum(parts, 0, out=dbeta)


def _prepared(
    q: Tensor,
    k: Tensor,
    g: Tensor,
    beta: Tensor | None,
    T: Tensor | None,
    chunks: int,
    tokens: int,
    plan: "Plan | None",
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Q', K', K" (b, t, h, k), e^G_last (chunks, h, k) and B (chunks, h, c, c)."""
    H, K = g.shape[2:]
    read, kept = (torch.empty(g.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    asked = None if beta is None else torch.empty_like(read)
    last, B = g.new_empty(chunks, H, K, dtype=torch.float32), k.new_empty(chunks, H, C, C)
    launch(
        prepare, chunks * H, q, k, g, beta, read, asked, kept, last, B, T, None if plan is None else plan.table, tokens, scale,
        *strides(q, k, g, g if beta is None else beta), **_blocks("prepare", k, g),
    )  # fmt: skip
    return read, asked, kept, last, B


def _blocks(name: str, k: Tensor, v: Tensor) -> dict[str, Any]:
    """Constants of a kernel for blocks of channels; v as any tensor of all heads."""
    H, (G, K), options = v.shape[2], k.shape[2:], OPTIONS[name]
    return options | {"H": H, "TIMES": H // G, "K": K, "BK": min(options["BK"], _padded(K)), "C": C}


def _loop(name: str, k: Tensor, v: Tensor) -> dict[str, Any]:
    """Constants of a kernel that goes through chunks."""
    K, (H, V), options = k.shape[3], v.shape[2:], OPTIONS[name]
    if K * k.element_size() > LARGE:
        options = options | {"num_warps": 8, "num_stages": 1}
    return options | {"H": H, "K": K, "V": V, "BK": _padded(K), "C": C}


def _programs(loop: dict[str, Any]) -> int:
    """Of a sequence."""
    return loop["H"] * -(-loop["V"] // loop["BV"])


def _padded(K: int) -> int:
    return max(NARROWEST, power_of_two(K))
