"""A window of chunks at a time: one program per sequence and block of channels, tiles of (chunk, channel).

A window's first state is known, so that it closes its own gaps before the next one starts, and what it read is still in
a cache when it reads it again.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import triton
import triton.language as tl

from plait.ops.shooting.triton.launch import kernel
from plait.ops.shooting.triton.tiles import (
    bottom,
    chain,
    distance,
    identity,
    newton,
    place,
    read,
    shifted,
    steps_at,
    times,
    wide,
    write,
)
from plait.ops.shooting.triton.vjp import back, gradients_at, states_at


@triton.jit
def where(condition, yes, no, N: tl.constexpr):
    out = ()
    for i in tl.static_range(N):
        out = out + (tl.where(condition, yes[i], no[i]),)
    return out


@triton.jit
def spread(tiles, C: tl.constexpr, BD: tl.constexpr, N: tl.constexpr):
    """(1, BD) tiles as (C, BD)."""
    out = ()
    for i in tl.static_range(N):
        out = out + (tl.broadcast_to(tiles[i], (C, BD)),)
    return out


@triton.jit
def through(
    x, h, rest, here, there, left, s, w, exists, stride_g, FROM: tl.constexpr, L: tl.constexpr,
    S: tl.constexpr, G: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr, JACOBIAN: tl.constexpr, D: tl.constexpr,
    ST: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """All chunks' steps FROM .. L - 1 at once -> ends, and Jacobians if it writes. A step's loads come one step ahead."""
    j = identity(s[0], S)
    x += FROM * ST
    ahead = steps_at(x, exists & (left > FROM), stride_g, G, ST, 0, 1)
    for u in range(FROM, L):
        now = wide(ahead, 0, G)
        x += ST
        ahead = steps_at(x, exists & (left > u + 1), stride_g, G, ST, 0, 1)
        if WRITE:
            new, by = JACOBIAN(now, s, w, V)
            j = where(left > u, times(by, j, S, S), j, S * S)
            tl.store(h + (here + u * D), new[0].to(h.dtype.element_ty), mask=exists & (left > u))
            for i in tl.static_range(1, S):
                tl.store(rest + (there + (u * (S - 1) + i - 1) * D), new[i], mask=exists & (left > u))
        else:
            new = STEP(now, s, w, V)
        s = where(left > u, new, s, S)
    return s, j


@kernel
def windows(
    x, h, rest, starts, ends, weights, table, info, tol,
    stride_b, stride_g, stride_h, tokens,
    S: tl.constexpr, G: tl.constexpr, W: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr, JACOBIAN: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, ST: tl.constexpr,
    C: tl.constexpr, L: tl.constexpr, BURN: tl.constexpr,
):  # fmt: skip
    """Forward. Every pass writes; the last one's stay. C passes close any window, so that none need fall back."""
    row, block, head, channel, unit, exists = place(tl.program_id(0), D, K, BD)
    channel, unit, exists = channel[None, :], unit[None, :], exists[None, :]
    c = tl.arange(0, C)[:, None]
    batch, begin = tl.load(table + row * 4).to(tl.int64), tl.load(table + row * 4 + 1).to(tl.int64)
    length = tl.load(table + row * 4 + 2)
    w = read(weights, unit, exists, W, D)
    first = read(starts + row.to(tl.int64) * (S * D), unit, exists, S, D)
    px = x + (batch * stride_b + head.to(tl.int64) * stride_h) + channel
    most, worst = 0, 0.0
    for at in range(0, length, C * L):
        left = length - at - c * L
        step = begin + at + c * L
        x_at = px + step * ST
        here = (batch * tokens + step) * D + unit
        there = (batch * tokens + step) * ((S - 1) * D) + unit
        s = spread(first, C, BD, S)
        if BURN > 0:
            s, slopes = through(
                x_at, h, rest, here, there, left, s, w, exists, stride_g, L - BURN, L,
                S, G, V, STEP, JACOBIAN, D, ST, False,
            )  # fmt: skip
            s = shifted(s, first, S, C)
        e, gap, passes = s, float("inf"), 0
        while (gap > tol) & (passes < C):
            e, j = through(
                x_at, h, rest, here, there, left, s, w, exists, stride_g, 0, L, S, G, V, STEP, JACOBIAN, D, ST, True
            )
            nexts = ()
            for i in tl.static_range(S):
                source = tl.broadcast_to(tl.minimum(c + 1, C - 1), s[i].shape)
                nexts = nexts + (tl.gather(s[i], source, 0),)
            gap = distance(e, nexts, exists & (c < C - 1), S)
            new, last = newton(e, nexts, j, (tl.zeros((1, BD), tl.float32),) * S, S, C)
            s = shifted(new, first, S, C)
            passes += 1
        first = bottom(e, S, C)
        most = tl.maximum(most, passes)
        worst = tl.maximum(worst, tl.where(passes < C, gap, 0.0))
    write(ends + row.to(tl.int64) * (S * D), unit, first, exists, S, D)
    tl.atomic_max(info, most.to(tl.float32))
    tl.atomic_max(info + 1, worst)


@kernel
def windows_back(
    x, h, rest, dh, h0, dfinal, weights, table, dx, dw, dstart,
    stride_b, stride_g, stride_h, dx_b, dx_g, dx_h, tokens,
    S: tl.constexpr, G: tl.constexpr, W: tl.constexpr, V: tl.constexpr, JACOBIAN: tl.constexpr, VJP: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, ST: tl.constexpr, DT: tl.constexpr,
    C: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Backward: per window, last first, the chunks' maps, the gradients at their ends, and then what is written. Row i of a
    tile is the window's chunk C - 1 - i, so that the scan goes from the last chunk to the first."""
    row, block, head, channel, unit, exists = place(tl.program_id(0), D, K, BD)
    channel, unit, exists = channel[None, :], unit[None, :], exists[None, :]
    c = C - 1 - tl.arange(0, C)[:, None]
    batch, begin = tl.load(table + row * 4).to(tl.int64), tl.load(table + row * 4 + 1).to(tl.int64)
    length = tl.load(table + row * 4 + 2)
    w = read(weights, unit, exists, W, D)
    initial = read(h0 + row.to(tl.int64) * (S * D), unit, exists, S, D)
    zero = tl.zeros((C, BD), tl.float32)
    carry = (tl.zeros((1, BD), tl.float32),) * S
    if dfinal is not None:
        carry = read(dfinal + row.to(tl.int64) * (S * D), unit, exists, S, D)
    total = (zero,) * W
    px = x + (batch * stride_b + head.to(tl.int64) * stride_h) + channel
    pd = dx + (batch * dx_b + head.to(tl.int64) * dx_h) + channel
    count = (length + C * L - 1) // (C * L)
    for window in range(0, count):
        offset = (count - 1 - window) * (C * L) + c * L
        lam, maps = (zero,) * S, identity(zero, S)
        for phase in tl.static_range(2):  # maps, then gradients
            for v in range(0, L):
                step = offset + (L - 1 - v)
                alive = step < length
                mask, earlier = exists & alive, exists & alive & (step > 0)
                token = batch * tokens + begin + step
                here, there = token * D + unit, token * ((S - 1) * D) + unit
                inputs = wide(steps_at(px + (begin + step) * ST, mask, stride_g, G, ST, 0, 1), 0, G)
                old = wide(states_at(h, rest, here, there, earlier, S, D, 1, 1), 0, S)
                old = where(step > 0, old, spread(initial, C, BD, S), S)
                gradient = gradients_at(dh, zero, here, mask, D, 1)
                new_lam, new_total, new_maps = back(
                    inputs, old, gradient[0], lam, total, maps, w, pd + (begin + step) * DT, dx_g, mask,
                    S, G, W, V, JACOBIAN, VJP, phase == 0,
                )  # fmt: skip
                lam = where(alive, new_lam, lam, S)
                if phase == 0:
                    maps = where(alive, new_maps, maps, S * S)
                else:
                    total = where(mask, new_total, total, W)
            if phase == 0:
                after = chain(maps, lam, carry, S)
                lam = shifted(after, carry, S, C)
                carry = bottom(after, S, C)
    write(dstart + row.to(tl.int64) * (S * D), unit, carry, exists, S, D)
    for i in tl.static_range(W):
        tl.store(dw + (row.to(tl.int64) * W + i) * D + unit, tl.sum(total[i], 0)[None, :], mask=exists)
