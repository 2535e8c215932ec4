"""The scalar-decay recurrence for a single token on the rows of a pool, as a Triton kernel: states are read once and written
once.

A layer's own way there may be part of it: with `A_log` and `dt_bias`, g comes as the projection of dt, and v is to be
multiplied by dt, which is held between two numbers; with `D`, D v is added to what comes out.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import math

import triton
import triton.language as tl
from torch import Tensor

from plait.ops.delta.triton import softplus
from plait.ops.launch import kernel, launch

ROWS = 16  # of a state in a program: 8 KB at 128 keys, and 128 programs for a single token of 32 heads of 64


@kernel
def advance(
    S, rows, q, k, v, g, A_log, dt_bias, D, o, scale, dt_min, dt_max, S_b, q_b, q_g, k_b, k_g, v_b, v_h, g_b, g_h,
    H: tl.constexpr, TIMES: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    LIMITED: tl.constexpr,
):  # fmt: skip
    """A program advances BV rows of the state of one head of one token."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    block, head, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks % H, tl.program_id(0) // (blocks * H)
    token = b.to(tl.int64)
    row = token if rows is None else tl.load(rows + b)
    c, d = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    there = S + row * S_b + (head * V + d[:, None]) * K + c[None, :]
    exists = (d < V)[:, None] & (c < K)[None, :]
    state = tl.load(there, mask=exists, other=0.0)
    queries = tl.load(q + token * q_b + head // TIMES * q_g + c, mask=c < K, other=0.0).to(tl.float32)
    keys = tl.load(k + token * k_b + head // TIMES * k_g + c, mask=c < K, other=0.0).to(tl.float32)
    values = tl.load(v + token * v_b + head * v_h + d, mask=d < V, other=0.0).to(tl.float32)
    log_decay = tl.load(g + token * g_b + head * g_h).to(tl.float32)
    added = values
    if A_log is not None:
        dt = softplus(log_decay + tl.load(dt_bias + head).to(tl.float32))
        if LIMITED:
            dt = tl.minimum(tl.maximum(dt, dt_min), dt_max)
        log_decay = -tl.exp(tl.load(A_log + head).to(tl.float32)) * dt
        added = values * dt

    state = state * tl.exp(log_decay) + added[:, None] * keys[None, :]
    tl.store(there, state, mask=exists)
    out = tl.sum(state * queries[None, :], 1) * scale
    if D is not None:
        out += values * tl.load(D + head).to(tl.float32)
    tl.store(o + (token * H + head) * V + d, out.to(o.dtype.element_ty), mask=d < V)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    rows: Tensor | None,
    out: Tensor,
    scale: float = 1.0,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> None:
    """Shapes as in `ssd` with t = 1; `rows` None: the rows of `state` are those of the call."""
    (b, _, H, V), (G, K) = v.shape, k.shape[2:]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    most = math.inf if dt_max is None else dt_max
    BV, BK = min(ROWS, triton.next_power_of_2(V)), triton.next_power_of_2(K)
    launch(
        advance, b * H * -(-V // BV), state, rows, q, k, v, g, A_log, dt_bias, D, out, scale, dt_min, most,
        state.stride(0), *(stride for x in (q, k, v, g) for stride in (x.stride(0), x.stride(2))),
        H=H, TIMES=H // G, K=K, V=V, BK=BK, BV=BV, LIMITED=dt_min > 0 or dt_max is not None,
        num_warps=max(1, BV * BK // 512),
    )  # fmt: skip
