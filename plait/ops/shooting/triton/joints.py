"""Between the passes of a grid of chunks: a program per sequence and block of channels goes along the chunks."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import triton.language as tl

from plait.ops.launch import kernel
from plait.ops.shooting.triton.tiles import bottom, chain, distance, newton, place, read, shifted, write


@kernel
def close(
    starts, ends, slopes, final, ranges, gaps, info, number, tol,
    S: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """New chunk starts after pass `number` (from 1), unless the gap was closed before. gaps (sequence, block): after the
    last pass, infinite before the first. LAST: what is open now will be run step by step."""
    row, block, head, channel, unit, exists = place(tl.program_id(0), D, K, BD)
    here = gaps + tl.program_id(0)
    if tl.load(here) <= tol:
        return
    first, count = tl.load(ranges + row * 2).to(tl.int64), tl.load(ranges + row * 2 + 1)
    unit, exists = unit[None, :], exists[None, :]
    c = tl.arange(0, C)[:, None]
    moved = ()
    for _ in tl.static_range(S):
        moved = moved + (tl.zeros((1, BD), tl.float32),)
    worst = 0.0
    for at in range(0, count - 1, C):
        real = (at + c < count - 1) & exists
        chunk = first + at + c
        e = read(ends, chunk * (S * D) + unit, real, S, D)
        s = read(starts, (chunk + 1) * (S * D) + unit, real, S, D)
        j = read(slopes, chunk * (S * S * D) + unit, real, S * S, D)
        worst = tl.maximum(worst, distance(e, s, real, S))
        new, moved = newton(e, s, j, moved, S, C)
        write(starts, (chunk + 1) * (S * D) + unit, new, real, S, D)
    tl.store(here, worst)
    last = read(ends, (first + count - 1) * (S * D) + unit, exists, S, D)
    write(final, row.to(tl.int64) * (S * D) + unit, last, exists, S, D)
    tl.atomic_max(info, number + 0.0)
    if worst <= tol:
        tl.atomic_max(info + 1, worst)
    elif LAST:
        tl.atomic_max(info + 2, 1.0)


@kernel
def hand_back(
    lams, adds, maps, dfinal, dh0, ranges,
    S: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient at every chunk's end, from the chunks' maps (transposed Jacobian, what the chunk adds), last first."""
    row, block, head, channel, unit, exists = place(tl.program_id(0), D, K, BD)
    first, count = tl.load(ranges + row * 2).to(tl.int64), tl.load(ranges + row * 2 + 1)
    unit, exists = unit[None, :], exists[None, :]
    i = tl.arange(0, C)[:, None]
    carry = ()
    for _ in tl.static_range(S):
        carry = carry + (tl.zeros((1, BD), tl.float32),)
    if dfinal is not None:
        carry = read(dfinal, row.to(tl.int64) * (S * D) + unit, exists, S, D)
    for at in range(0, count, C):
        real = (at + i < count) & exists
        chunk = first + count - 1 - at - i
        a = read(maps, chunk * (S * S * D) + unit, real, S * S, D)
        b = read(adds, chunk * (S * D) + unit, real, S, D)
        for k in tl.static_range(S):  # past the first chunk nothing changes
            a = a[: k * S + k] + (tl.where(at + i < count, a[k * S + k], 1.0),) + a[k * S + k + 1 :]
        after = chain(a, b, carry, S)
        write(lams, chunk * (S * D) + unit, shifted(after, carry, S, C), real, S, D)
        carry = bottom(after, S, C)
    write(dh0, row.to(tl.int64) * (S * D) + unit, carry, exists, S, D)
