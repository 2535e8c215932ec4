"""All that a gated DeltaNet layer does between its projections with a single token on the rows of a pool, as one Triton kernel.

A convolution with SiLU, q and k of length 1, gates, the delta rule, and the gated norm: states and tails are read once and
written once, and nothing in between leaves the chip.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import triton
import triton.language as tl
from torch import Tensor

from plait.ops.delta.triton import softplus
from plait.ops.launch import kernel, launch

NUMBERS = 2048  # of a state in a warp: 64 in a thread


@triton.jit
def filtered(tail, x, weight, d, exists, tail_t, W: tl.constexpr, BW: tl.constexpr):
    """Channels d after the filter and SiLU, and what it saw: the tail (BW, d), and the token."""
    t = tl.arange(0, BW)
    seen = (t < W - 1)[:, None] & exists[None, :]
    past = tl.load(tail + t[:, None] * tail_t + d[None, :], mask=seen, other=0.0)
    taps = tl.load(weight + d[None, :] * W + t[:, None], mask=seen, other=0.0).to(tl.float32)
    new = tl.load(x + d, mask=exists, other=0.0)
    tap = tl.load(weight + d * W + W - 1, mask=exists, other=0.0).to(tl.float32)
    total = tl.sum(past.to(tl.float32) * taps, 0) + new.to(tl.float32) * tap
    return total * tl.sigmoid(total), past, new


@triton.jit
def moved_on(tail, past, new, d, exists, tail_t, W: tl.constexpr, BW: tl.constexpr):
    """The tail after this token."""
    t = tl.arange(0, BW)
    kept = ((t > 0) & (t < W - 1))[:, None] & exists[None, :]
    tl.store(tail + (t[:, None] - 1) * tail_t + d[None, :], past, mask=kept)
    tl.store(tail + (W - 2) * tail_t + d, new.to(tail.dtype.element_ty), mask=exists)


@kernel
def advance(
    S, tails, rows, x, weight, z, b, a, A_log, dt_bias, norm, o, eps, most, norm_eps,
    S_b, tails_b, tails_t, x_b, z_b, b_b, a_b,
    G: tl.constexpr, TIMES: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """A program does a key head of one token, and the TIMES value heads that it serves."""
    group, number = tl.program_id(0) % G, tl.program_id(0) // G
    token = number.to(tl.int64)
    row = token if rows is None else tl.load(rows + number)
    c, d = tl.arange(0, BK), tl.arange(0, BV)
    exists = (d < V)[:, None] & (c < K)[None, :]
    x += token * x_b
    tail = tails + row * tails_b
    at_q, at_k = group * K + c, (G + group) * K + c
    queries, past_q, new_q = filtered(tail, x, weight, at_q, c < K, tails_t, W, BW)
    keys, past_k, new_k = filtered(tail, x, weight, at_k, c < K, tails_t, W, BW)
    tl.debug_barrier()  # the same channels are in several threads, of which none may write before all have read
    moved_on(tail, past_q, new_q, at_q, c < K, tails_t, W, BW)
    moved_on(tail, past_k, new_k, at_k, c < K, tails_t, W, BW)
    queries *= tl.rsqrt(tl.sum(queries * queries, 0) + eps)
    keys *= tl.rsqrt(tl.sum(keys * keys, 0) + eps)
    for i in tl.static_range(TIMES):
        head = group * TIMES + i
        there = S + row * S_b + (head * V + d[:, None]) * K + c[None, :]
        state = tl.load(there, mask=exists, other=0.0)
        at_v = 2 * G * K + head * V + d
        values, past_v, new_v = filtered(tail, x, weight, at_v, d < V, tails_t, W, BW)
        step = softplus(tl.load(a + token * a_b + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32))
        strength = tl.sigmoid(tl.load(b + token * b_b + head).to(tl.float32)) * most
        state *= tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * step)
        error = strength * (values - tl.sum(state * keys[None, :], 1))
        state += error[:, None] * keys[None, :]
        tl.store(there, state, mask=exists)
        out = tl.sum(state * queries[None, :], 1)
        gate = tl.load(z + token * z_b + head * V + d, mask=d < V, other=0.0).to(tl.float32)
        factor = tl.load(norm + d, mask=d < V, other=0.0).to(tl.float32) * gate * tl.sigmoid(gate)
        out *= tl.rsqrt(tl.sum(out * out, 0) / V + norm_eps) * factor
        tl.store(o + (token * G * TIMES + head) * V + d, out.to(o.dtype.element_ty), mask=d < V)
        tl.debug_barrier()
        moved_on(tail, past_v, new_v, at_v, d < V, tails_t, W, BW)


def run(
    x: Tensor, z: Tensor, b: Tensor, a: Tensor, weight: Tensor, A_log: Tensor, dt_bias: Tensor, norm: Tensor,
    state: Tensor, tails: Tensor, rows: Tensor | None, out: Tensor, eps: float, most: float, norm_eps: float,
) -> None:  # fmt: skip
    """Shapes as in `whole.run`."""
    (n, _, H, V), K = out.shape, state.shape[-1]
    G = (x.shape[-1] - H * V) // (2 * K)
    BK, BV = triton.next_power_of_2(K), triton.next_power_of_2(V)
    launch(
        advance, n * G, state, tails, rows, x, weight, z, b, a, A_log, dt_bias, norm, out, eps, most, norm_eps,
        state.stride(0), *tails.stride()[:2], *(y.stride(0) for y in (x, z, b, a)),
        G=G, TIMES=H // G, K=K, V=V, W=weight.shape[1], BK=BK, BV=BV, BW=triton.next_power_of_2(weight.shape[1]),
        num_warps=max(1, min(16, BV * BK // NUMBERS)),
    )  # fmt: skip
