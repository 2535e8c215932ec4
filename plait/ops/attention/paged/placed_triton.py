"""New queries and keys normed and turned, and keys and values written to their pages, as one Triton kernel; float32 inside."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import triton
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch


@triton.jit
def normed(x, i, exists, q_norm, k_norm, scale, query, ZERO_CENTERED: tl.constexpr):
    """Channels i times the norm's scale and weight, of a query or of a key."""
    factor = tl.load(q_norm + i, mask=exists & query, other=0.0).to(tl.float32)
    factor += tl.load(k_norm + i, mask=exists & (query == 0), other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        factor += 1.0
    return x * scale * factor


@kernel
def place(
    qk, v, cos, sin, q_norm, k_norm, q, k_pages, v_pages, table, lengths, eps,
    qk_b, qk_t, qk_h, v_b, v_t, v_h, kp_p, kp_s, kp_g, vp_p, vp_s, vp_g, capacity, n,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PAGE: tl.constexpr, ZERO_CENTERED: tl.constexpr,
):  # fmt: skip
    """A program does one head of one token: a query, or a key and its value. R pairs turn, the channels after them do not."""
    head, number = tl.program_id(0) % (H + G), tl.program_id(0) // (H + G)
    row, token = (number // T).to(tl.int64), number % T
    query = head < H
    i, c, d = tl.arange(0, BR), tl.arange(0, BK), tl.arange(0, BV)
    pairs, others = i < R, (c >= 2 * R) & (c < K)
    here = qk + row * qk_b + token * qk_t + head * qk_h
    first = tl.load(here + i, mask=pairs, other=0.0).to(tl.float32)
    second = tl.load(here + R + i, mask=pairs, other=0.0).to(tl.float32)
    rest = tl.load(here + c, mask=others, other=0.0).to(tl.float32)
    if q_norm is not None:
        squares = tl.sum(first * first, 0) + tl.sum(second * second, 0) + tl.sum(rest * rest, 0)
        scale = tl.rsqrt(squares / K + eps)
        first = normed(first, i, pairs, q_norm, k_norm, scale, query, ZERO_CENTERED)
        second = normed(second, R + i, pairs, q_norm, k_norm, scale, query, ZERO_CENTERED)
        rest = normed(rest, c, others, q_norm, k_norm, scale, query, ZERO_CENTERED)
    turn = tl.load(cos + number * R + i, mask=pairs, other=0.0).to(tl.float32)
    side = tl.load(sin + number * (2 * R) + R + i, mask=pairs, other=0.0).to(tl.float32)
    one, other = first * turn - second * side, second * turn + first * side
    if query:
        there = q + (number.to(tl.int64) * H + head) * K
        tl.store(there + i, one.to(q.dtype.element_ty), mask=pairs)
        tl.store(there + R + i, other.to(q.dtype.element_ty), mask=pairs)
        tl.store(there + c, rest.to(q.dtype.element_ty), mask=others)
    else:
        at = tl.minimum(tl.maximum(tl.load(lengths + row) - T, 0).to(tl.int32) + token, capacity - 1)
        page, offset, g = row, at, head - H
        if table is not None:
            page, offset = tl.load(table + row * n + at // PAGE).to(tl.int64), at % PAGE
        offset = offset.to(tl.int64)  # the one page of a row may hold more than 2**31 numbers
        keys = k_pages + page * kp_p + offset * kp_s + g * kp_g
        tl.store(keys + i, one.to(k_pages.dtype.element_ty), mask=pairs)
        tl.store(keys + R + i, other.to(k_pages.dtype.element_ty), mask=pairs)
        tl.store(keys + c, rest.to(k_pages.dtype.element_ty), mask=others)
        values = tl.load(v + row * v_b + token * v_t + g * v_h + d, mask=d < V, other=0.0)
        tl.store(v_pages + page * vp_p + offset * vp_s + g * vp_g + d, values.to(v_pages.dtype.element_ty), mask=d < V)


def run(
    qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    zero_centered: bool, q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor | None, lengths: Tensor,
) -> None:  # fmt: skip
    """Shapes as in `placed.place`; q (b, t, h, k) is written."""
    (b, t, H, K), (page, G, V), R = q.shape, v_pages.shape[1:], cos.shape[-1]
    capacity, n = (page, 0) if table is None else (page * table.shape[1], table.shape[1])
    launch(
        place, b * t * (H + G), qk, v, cos, sin, q_norm, k_norm, q, k_pages, v_pages, table, lengths, eps,
        *qk.stride()[:3], *v.stride()[:3], *k_pages.stride()[:3], *v_pages.stride()[:3], capacity, n,
        T=t, H=H, G=G, K=K, V=V, R=R, BR=triton.next_power_of_2(R), BK=triton.next_power_of_2(K),
        BV=triton.next_power_of_2(V), PAGE=page, ZERO_CENTERED=zero_centered, num_warps=1,
    )  # fmt: skip
