"""Recurrences with one decay a head, in chunks of 64 tokens, as Triton kernels: S <- a S + v k^T (ssd), and, where what is
written is corrected by what the state answers already, S <- a S (I - b k k^T) + b v k^T (the gated delta rule).

With G the sums of log decays from the chunk's start, a = exp(G), P_ij = exp(G_i - G_j) for j <= i, S the state before the
chunk, and A_ij = b_i P_ij k_i . k_j for j < i,

    V' = (I + A)^-1 R,  R = b (V - a K S^T)        (ssd: V' = V)
    O = (P * QK^T) V' + a Q S^T                    S <- a_last S + V'^T (a_last / a) K

(arXiv 2412.06464, section 3.3; arXiv 2405.21060, section 6). `invert` makes (I + A)^-1 of every chunk, all at once; `forward`
goes through the chunks of one sequence, head and block of values; `backward` does so in reverse; `gradients` gives what every
chunk's inputs get from that, all chunks at once. States and sums are float32, products of 16-bit numbers.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
# (it reads kernels as Python, in which triton's functions only raise)

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch

if TYPE_CHECKING:
    from plait.ops.chunks_gpu import Plan

C = 64  # tokens of a chunk; tensor cores of an H100 take 64 rows at once
# values of a program. With 32, Triton 3.6 compiles `forward` for an H100 wrongly: outputs that are not the kernel's, or memory
# that is not its own, by number of stages; in its interpreter 32 is right, and with 64 so is all that was tried
BV = 64
# as measured on an H100 by benchmarks/chunks.py
OPTIONS = {
    "invert": {"num_warps": 4, "num_stages": 1},
    "forward": {"num_warps": 4, "num_stages": 2},
    "backward": {"num_warps": 4, "num_stages": 2},
    "gradients": {"num_warps": 8, "num_stages": 2},
}


@triton.jit
def tokens_of(chunk, table, tokens, C: tl.constexpr):
    """Where a chunk begins among all tokens, and how many it has. table (chunks, 2), or none where rows are equally long."""
    if table is None:
        per_row = (tokens + C - 1) // C
        start = chunk % per_row * C
        first, count = (chunk // per_row).to(tl.int64) * tokens + start, tokens - start
    else:
        first, count = tl.load(table + chunk * 2).to(tl.int64), tl.load(table + chunk * 2 + 1)
    return first, tl.minimum(count, C).to(tl.int32)


@triton.jit
def numbers(x, first, count, stride, C: tl.constexpr):
    """One for each token of a chunk, zeros after its end."""
    i = tl.arange(0, C)
    return tl.load(x + (first + i) * stride, mask=i < count, other=0.0).to(tl.float32)


@triton.jit
def tile(x, first, count, stride, d, D: tl.constexpr, C: tl.constexpr):
    """All rows of a chunk, columns d; zeros after its end."""
    i = tl.arange(0, C)
    return tl.load(
        x + (first + i[:, None]) * stride + d[None, :], mask=(i < count)[:, None] & (d < D)[None, :], other=0.0
    )


@triton.jit
def keep(x, first, count, stride, d, D: tl.constexpr, C: tl.constexpr, y):
    i = tl.arange(0, C)
    there = x + (first + i[:, None]) * stride + d[None, :]
    tl.store(there, y.to(x.dtype.element_ty), mask=(i < count)[:, None] & (d < D)[None, :])


@triton.jit
def decays(g, first, count, stride, C: tl.constexpr):
    """G, its last, and P."""
    i = tl.arange(0, C)
    here = numbers(g, first, count, stride, C)
    G = tl.cumsum(here)
    seen = i[:, None] >= i[None, :]
    return G, tl.sum(here), tl.where(seen, tl.exp(tl.where(seen, G[:, None] - G[None, :], 0.0)), 0.0)


@triton.jit
def times(x, y):
    """A product in float32, of three of the tensor cores' own."""
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit
def inverse(A, C: tl.constexpr):
    """(I + A)^-1 of an A that is 0 from the diagonal on.

    The four blocks of 16 on the diagonal are inverted one row after the other, which no gates make inexact. With D their
    inverses and N = D (I + A) - I, which has only blocks below the diagonal, so that N^4 = 0, (I + A)^-1 = (I - N)(I + N^2) D.
    """
    i, j = tl.arange(0, C), tl.arange(0, 16)
    diagonal = i[:, None] // 16 == i[None, :] // 16
    D = -tl.sum(tl.reshape(tl.where(diagonal, A, 0.0), [C // 16, 16, C // 16, 16]), 2)  # (blocks, 16, 16)
    for row in range(2, 16):
        mine = (j == row)[None, :, None]
        r = tl.sum(tl.where(mine, D, 0.0), 1)
        D = tl.where(mine, (r + tl.sum(r[:, :, None] * D, 1))[:, None, :], D)
    D = tl.where((j[:, None] == j[None, :])[None, :, :], 1.0, D)
    D = tl.reshape(tl.broadcast_to(D[:, :, None, :], [C // 16, 16, C // 16, 16]), [C, C])
    D = tl.where(diagonal, D, 0.0)
    N = times(D, tl.where(diagonal, 0.0, A))
    unit = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    return times(times(unit - N, unit + times(N, N)), D)


@kernel
def invert(
    k, g, beta, T, table, tokens, k_t, k_h, g_t, g_h, b_t, b_h,
    H: tl.constexpr, TIMES: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program inverts I + A of one chunk of one head."""
    head, chunk = tl.program_id(0) % H, tl.program_id(0) // H
    first, count = tokens_of(chunk, table, tokens, C)
    i, d = tl.arange(0, C), tl.arange(0, BK)
    keys = tile(k + head // TIMES * k_h, first, count, k_t, d, K, C)
    _, _, P = decays(g + head * g_h, first, count, g_t, C)
    b = numbers(beta + head * b_h, first, count, b_t, C)
    A = tl.where(i[:, None] > i[None, :], tl.dot(keys, tl.trans(keys)) * P * b[:, None], 0.0)
    there = tl.program_id(0).to(tl.int64) * C * C
    tl.store(T + there + i[:, None] * C + i[None, :], inverse(A, C).to(T.dtype.element_ty))


@triton.jit
def rows_of(n, cu, base, tokens, C: tl.constexpr):
    """First token, tokens and first chunk of a sequence."""
    if cu is None:
        first, length, chunk = n.to(tl.int64) * tokens, tokens, n * ((tokens + C - 1) // C)
    else:
        first = tl.load(cu + n).to(tl.int64)
        length, chunk = (tl.load(cu + n + 1) - first).to(tl.int32), tl.load(base + n)
    return first, length, chunk


@triton.jit
def matrix(x, there, e, d, E: tl.constexpr, D: tl.constexpr):
    return tl.load(x + there + e[:, None] * D + d[None, :], mask=(e < E)[:, None] & (d < D)[None, :], other=0.0)


@kernel
def forward(
    q, k, v, g, beta, T, S0, o, S1, before, written, cu, base, tokens, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, g_t, g_h, b_t, b_h,
    H: tl.constexpr, TIMES: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """A program goes through the chunks of one head of one sequence, with BV of its values."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    head, n = pid // blocks % H, pid // (blocks * H)
    first, length, chunk = rows_of(n, cu, base, tokens, C)
    d, e = tl.arange(0, BK), pid % blocks * BV + tl.arange(0, BV)
    q, k, v = q + head // TIMES * q_h, k + head // TIMES * k_h, v + head * v_h
    g, o = g + head * g_h, o + head * V
    dtype: tl.constexpr = q.dtype.element_ty
    S = tl.zeros([BK, BV], tl.float32)
    state = (n.to(tl.int64) * H + head) * V * K
    if S0 is not None:  # (V, K)
        S += tl.load(S0 + state + e[None, :] * K + d[:, None], mask=(d < K)[:, None] & (e < V)[None, :], other=0.0)
    for start in range(0, length, C):
        at, count = first + start, tl.minimum(length - start, C)
        there = (chunk + start // C).to(tl.int64) * H + head
        G, last, P = decays(g, at, count, g_t, C)
        a = tl.exp(G)
        keys = tile(k, at, count, k_t, d, K, C)
        queries = tile(q, at, count, q_t, d, K, C)
        values = tile(v, at, count, v_t, e, V, C)
        held = S.to(dtype)
        if before is not None:
            tl.store(
                before + there * K * V + d[:, None] * V + e[None, :], held, mask=(d < K)[:, None] & (e < V)[None, :]
            )
        if beta is not None:
            b = numbers(beta + head * b_h, at, count, b_t, C)
            R = b[:, None] * (values.to(tl.float32) - a[:, None] * tl.dot(keys, held))
            values = tl.dot(matrix(T, there * C * C, tl.arange(0, C), tl.arange(0, C), C, C), R.to(dtype)).to(dtype)
            if written is not None:
                keep(written + head * V, at, count, H * V, e, V, C, values)
        scores = (tl.dot(queries, tl.trans(keys)) * P).to(dtype)
        out = tl.dot(queries, held) * a[:, None] + tl.dot(scores, values)
        keep(o, at, count, H * V, e, V, C, out * scale)
        later = (values.to(tl.float32) * tl.exp(last - G)[:, None]).to(dtype)
        S = S * tl.exp(last) + tl.dot(tl.trans(keys), later)
    if S1 is not None:
        tl.store(S1 + state + e[None, :] * K + d[:, None], S, mask=(d < K)[:, None] & (e < V)[None, :])


@kernel
def backward(
    q, k, g, beta, T, do, dS1, dS0, after, corrected, cu, base, tokens, scale,
    q_t, q_h, k_t, k_h, g_t, g_h, b_t, b_h, o_t, o_h,
    H: tl.constexpr, TIMES: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The same, from the last chunk to the first: the gradient of the state after each, and of R (ssd: of V)."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    head, n = pid // blocks % H, pid // (blocks * H)
    first, length, chunk = rows_of(n, cu, base, tokens, C)
    d, e = tl.arange(0, BK), pid % blocks * BV + tl.arange(0, BV)
    q, k = q + head // TIMES * q_h, k + head // TIMES * k_h
    g, do = g + head * g_h, do + head * o_h
    dtype: tl.constexpr = q.dtype.element_ty
    dS = tl.zeros([BK, BV], tl.float32)
    state = (n.to(tl.int64) * H + head) * V * K
    if dS1 is not None:
        dS += tl.load(dS1 + state + e[None, :] * K + d[:, None], mask=(d < K)[:, None] & (e < V)[None, :], other=0.0)
    chunks = (length + C - 1) // C
    for step in range(0, chunks):
        start = (chunks - 1 - step) * C
        at, count = first + start, tl.minimum(length - start, C)
        there = (chunk + start // C).to(tl.int64) * H + head
        G, last, P = decays(g, at, count, g_t, C)
        a = tl.exp(G)
        keys = tile(k, at, count, k_t, d, K, C)
        queries = tile(q, at, count, q_t, d, K, C)
        gradient = tile(do, at, count, o_t, e, V, C)
        held = dS.to(dtype)
        tl.store(after + there * K * V + d[:, None] * V + e[None, :], held, mask=(d < K)[:, None] & (e < V)[None, :])
        scores = (tl.dot(queries, tl.trans(keys)) * (P * scale)).to(dtype)
        dV = tl.dot(tl.trans(scores), gradient) + tl.dot(keys, held) * tl.exp(last - G)[:, None]
        read = (gradient.to(tl.float32) * (a * scale)[:, None]).to(dtype)
        dS = dS * tl.exp(last) + tl.dot(tl.trans(queries), read)
        if beta is not None:
            b = numbers(beta + head * b_h, at, count, b_t, C)
            dV = tl.dot(tl.trans(matrix(T, there * C * C, tl.arange(0, C), tl.arange(0, C), C, C)), dV.to(dtype))
            dS -= tl.dot(tl.trans(keys), (dV * (a * b)[:, None]).to(dtype))
        keep(corrected + head * V, at, count, H * V, e, V, C, dV)
    if dS0 is not None:
        tl.store(dS0 + state + e[None, :] * K + d[:, None], dS, mask=(d < K)[:, None] & (e < V)[None, :])


@kernel
def gradients(
    q, k, v, g, beta, do, written, corrected, before, after, dq, dk, dv, dg, dbeta, table, tokens, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, g_t, g_h, b_t, b_h, o_t, o_h,
    H: tl.constexpr, TIMES: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """A program gives the gradients of one chunk of one head; dq and dk of each head that reads the same q and k."""
    head, chunk = tl.program_id(0) % H, tl.program_id(0) // H
    first, count = tokens_of(chunk, table, tokens, C)
    there = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, C), tl.arange(0, BK)
    dtype: tl.constexpr = q.dtype.element_ty
    G, last, P = decays(g + head * g_h, first, count, g_t, C)
    a, to_end = tl.exp(G), tl.exp(last - G)
    queries = tile(q + head // TIMES * q_h, first, count, q_t, d, K, C)
    keys = tile(k + head // TIMES * k_h, first, count, k_t, d, K, C)
    dQ, from_end = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    dB = tl.zeros([C, C], tl.float32)
    kept = tl.zeros([BK], tl.float32)
    if beta is not None:
        b = numbers(beta + head * b_h, first, count, b_t, C)
        asked, dA, db = tl.zeros([C, BK], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for at in range(0, V, BV):
        e = at + tl.arange(0, BV)
        gradient = tile(do + head * o_h, first, count, o_t, e, V, C)
        values = tile(v + head * v_h, first, count, v_t, e, V, C)
        S, dS = matrix(before, there * K * V, d, e, K, V), matrix(after, there * K * V, d, e, K, V)
        dQ += tl.dot(gradient, tl.trans(S))
        kept += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        if beta is not None:
            dR = tile(corrected + head * V, first, count, H * V, e, V, C)
            keep(dv + head * V, first, count, H * V, e, V, C, dR.to(tl.float32) * b[:, None])
            db += tl.sum(dR.to(tl.float32) * values.to(tl.float32), 1)
            values = tile(written + head * V, first, count, H * V, e, V, C)
            asked += tl.dot(dR, tl.trans(S))
            dA -= tl.dot(dR, tl.trans(values))
        dB += tl.dot(gradient, tl.trans(values))
        from_end += tl.dot(values, tl.trans(dS))

    q32, k32 = queries.to(tl.float32), keys.to(tl.float32)
    dQ *= (a * scale)[:, None]
    dK = from_end * to_end[:, None]
    into_end = tl.sum(k32 * dK, 1)
    dG = tl.sum(q32 * dQ, 1) - into_end
    dlast = tl.sum(into_end) + tl.exp(last) * tl.sum(kept)
    dB *= P * scale
    pairs = dB * tl.dot(queries, tl.trans(keys))
    if beta is not None:
        asked *= a[:, None]
        answer = tl.sum(k32 * asked, 1)
        db -= answer
        dG -= b * answer
        dK -= asked * b[:, None]
        dA = tl.where(i[:, None] > i[None, :], dA * P, 0.0)
        alike = dA * tl.dot(keys, tl.trans(keys))
        db += tl.sum(alike, 1)
        pairs += alike * b[:, None]
        dA = (dA * b[:, None]).to(dtype)
        dK += tl.dot(dA, keys) + tl.dot(tl.trans(dA), keys)
        j = i < count
        tl.store(dbeta + (first + i) * H + head, db, mask=j)
    dB = dB.to(dtype)
    dQ += tl.dot(dB, keys)
    dK += tl.dot(tl.trans(dB), queries)
    keep(dq + head * K, first, count, H * K, d, K, C, dQ)
    keep(dk + head * K, first, count, H * K, d, K, C, dK)
    dG += tl.sum(pairs, 1) - tl.sum(pairs, 0) + tl.where(i == C - 1, dlast, 0.0)
    # g of a token is in the sums of all later ones, so its gradient is what they get
    all_of_it = tl.sum(dG)
    tl.store(dg + (first + i) * H + head, all_of_it - tl.cumsum(dG) + dG, mask=i < count)


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
    """Shapes as in `plait.ops.chunks_gpu`. Inverses are made first, if there are any."""
    sizes, n, chunks = _sizes(k, v), *counts(v, plan)
    if beta is not None:
        table = None if plan is None else plan.table
        launch(
            invert, chunks * sizes["H"], k, g, beta, T, table, v.shape[1], *strides(k, g, beta),
            **_without(sizes, "V"), **OPTIONS["invert"],
        )  # fmt: skip
    cuts, base = (None, None) if plan is None else plan[:2]
    launch(
        forward, n * sizes["H"] * -(-sizes["V"] // BV), q, k, v, g, beta, T, state, o, last if state is not None else None,
        before, written, cuts, base, v.shape[1], scale, *strides(q, k, v, g, beta if beta is not None else g),
        **sizes, BV=BV, **OPTIONS["forward"],
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
    sizes, n, chunks = _sizes(k, v), *counts(v, plan)
    cuts, base, table = (None, None, None) if plan is None else plan
    after = torch.empty_like(before)
    corrected = dv if beta is None else torch.empty_like(dv)
    b = g if beta is None else beta
    launch(
        backward, n * sizes["H"] * -(-sizes["V"] // BV), q, k, g, beta, T, do, dlast, first if len(first) else None, after,
        corrected, cuts, base, v.shape[1], scale, *strides(q, k, g, b, do),
        **sizes, BV=BV, **OPTIONS["backward"],
    )  # fmt: skip
    launch(
        gradients, chunks * sizes["H"], q, k, v, g, beta, do, written, corrected, before, after, dq, dk, dv, dg, dbeta, table,
        v.shape[1], scale, *strides(q, k, v, g, b, do),
        **sizes, BV=BV, **OPTIONS["gradients"],
    )  # fmt: skip


def _sizes(k: Tensor, v: Tensor) -> dict[str, Any]:
    H, (G, K), V = v.shape[2], k.shape[2:], v.shape[3]
    return {"H": H, "TIMES": H // G, "K": K, "V": V, "BK": max(16, triton.next_power_of_2(K)), "C": C}


def _without(sizes: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in sizes.items() if key != name}


def counts(v: Tensor, plan: "Plan | None") -> tuple[int, int]:
    """Sequences and chunks."""
    b, t = v.shape[:2]
    return (b, b * -(-t // C)) if plan is None else (len(plan.base), len(plan.table))


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """From token to token, and from head to head."""
    return tuple(stride for x in tensors for stride in (x.stride(1), x.stride(2)))
