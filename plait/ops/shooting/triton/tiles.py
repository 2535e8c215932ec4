"""Pieces that all kernels share: addresses, loads, small matrices kept as flat tuples of tiles."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false, reportAssignmentType=false
# (it reads kernels as Python, in which triton's functions only raise)

import triton
import triton.language as tl

from plait.ops.shooting.triton.cells import FAST

HALF = tl.constexpr("{ .reg .b16 half; cvt.u16.u32 half, $1; cvt.f32.f16 $0, half; }")


@triton.jit
def place(program, D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr):
    """Item of work, block, the block's head, its channels inside the head, the same among all, and which exist."""
    inside: tl.constexpr = (K + BD - 1) // BD
    blocks: tl.constexpr = (D // K) * inside
    item, block = program // blocks, program % blocks
    head = block // inside
    channel = (block % inside) * BD + tl.arange(0, BD)
    return item, block, head, channel, head * K + channel, channel < K


@triton.jit
def read(pointer, offsets, exists, N: tl.constexpr, D: tl.constexpr):
    """N vectors of D channels that lie one after the other, as float32 tiles."""
    tiles = ()
    for i in tl.static_range(N):
        tiles = tiles + (tl.load(pointer + i * D + offsets, mask=exists, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def write(pointer, offsets, tiles, exists, N: tl.constexpr, D: tl.constexpr):
    for i in tl.static_range(N):
        tl.store(pointer + i * D + offsets, tiles[i], mask=exists)


@triton.jit
def steps_at(x, exists, stride_g, G: tl.constexpr, ST: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr):
    """The G inputs of N steps at pointers `x`, as they are in memory: (step, input) flattened. Every step is a constant
    away from its input's pointer, so that a load is one instruction. `exists` None loads without a mask."""
    loaded = ()
    for u in tl.static_range(N):
        for g in tl.static_range(G):
            loaded = loaded + (tl.load((x + g * stride_g) + (FIRST + u) * ST, mask=exists),)
    return loaded


@triton.jit
def lines(pointer, stride, stride_step, N: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):
    """Addresses of all 32-byte sectors of N rows of BD channels, `stride` apart, in each of U steps: one a thread."""
    size: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    each: tl.constexpr = BD * size // 32 if BD * size > 32 else 1
    i = tl.arange(0, triton.next_power_of_2(N * U * each))
    step = tl.minimum(i // (N * each), U - 1)
    return (pointer + (step * stride_step + i // each % N * stride + i % each * (32 // size))).to(
        tl.int64, bitcast=True
    )


@triton.jit
def fetch(addresses):
    """Bring the sectors into the second-level cache, without waiting and without a register to hold them."""
    if FAST:
        code: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(code, "=r,l", [addresses], tl.int32, is_pure=False, pack=1)


@triton.jit
def settled(tiles, N: tl.constexpr):
    """The tiles in float32, by an instruction that the compiler cannot move past the end of a loop's body.

    So what is loaded at the start of a body for the next one is waited for at this body's end. Left alone, the compiler
    converts where a value is used, and then loads at a body's very end, to wait at once.
    """
    out = ()
    for i in tl.static_range(N):
        tile = tiles[i]
        if not FAST:
            out = out + (tile.to(tl.float32),)
        elif tile.dtype == tl.bfloat16:
            bits = tile.to(tl.uint16, bitcast=True).to(tl.uint32)
            out = out + (tl.inline_asm_elementwise("shl.b32 $0, $1, 16;", "=f,r", [bits], tl.float32, True, 1),)
        elif tile.dtype == tl.float16:
            bits = tile.to(tl.uint16, bitcast=True).to(tl.uint32)
            out = out + (tl.inline_asm_elementwise(HALF, "=f,r", [bits], tl.float32, True, 1),)
        else:
            out = out + (tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [tile], tl.float32, True, 1),)
    return out


@triton.jit
def to_float32(tiles, FIRST: tl.constexpr, N: tl.constexpr):
    """N of the tiles in float32."""
    out = ()
    for i in tl.static_range(N):
        out = out + (tiles[FIRST + i].to(tl.float32),)
    return out


@triton.jit
def times(a, b, S: tl.constexpr, N: tl.constexpr):
    """(S, S) @ (S, N), flattened by rows."""
    out = ()
    for i in tl.static_range(S):
        for j in tl.static_range(N):
            value = a[i * S] * b[j]
            for k in tl.static_range(1, S):
                value = tl.fma(a[i * S + k], b[k * N + j], value)
            out = out + (value,)
    return out


@triton.jit
def identity(tile, S: tl.constexpr):
    out = ()
    for i in tl.static_range(S):
        for j in tl.static_range(S):
            out = out + (tl.zeros_like(tile) + (1.0 if i == j else 0.0),)
    return out


# --- affine maps v -> A v + b along the first axis of a tile


@triton.jit
def _then1(a, b, c, d):
    return a * c, tl.fma(c, b, d)


@triton.jit
def _then(a, b, c, d, S: tl.constexpr):
    """The second map (c, d) after the first (a, b)."""
    moved, out = times(c, b, S, 1), ()
    for i in tl.static_range(S):
        out = out + (moved[i] + d[i],)
    return times(c, a, S, S) + out


@triton.jit
def _then2(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, d0, d1):
    return _then((a0, a1, a2, a3), (b0, b1), (c0, c1, c2, c3), (d0, d1), 2)


@triton.jit
def _then3(
    a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, c0, c1, c2, c3, c4, c5, c6, c7, c8, d0, d1, d2
):  # fmt: skip
    return _then(
        (a0, a1, a2, a3, a4, a5, a6, a7, a8), (b0, b1, b2), (c0, c1, c2, c3, c4, c5, c6, c7, c8), (d0, d1, d2), 3
    )


@triton.jit
def tame(v):
    """No step that Newton's linear model finds beyond all reason, or not at all: the chunk's own end is taken as it is."""
    return tl.where(tl.abs(v) < 1e6, v, 0.0)


@triton.jit
def chain(maps, shifts, carry, S: tl.constexpr):
    """v_{c+1} = A_c v_c + b_c with v_0 = `carry` (1, BD) -> all v_{c+1}."""
    if S == 1:
        scanned = tl.associative_scan((maps[0], shifts[0]), 0, _then1)
    elif S == 2:
        scanned = tl.associative_scan(maps + shifts, 0, _then2)
    else:
        scanned = tl.associative_scan(maps + shifts, 0, _then3)
    out = ()
    for i in tl.static_range(S):
        value = scanned[S * S + i]
        for k in tl.static_range(S):
            value = tl.fma(scanned[i * S + k], carry[k], value)
        out = out + (value,)
    return out


@triton.jit
def shifted(tiles, carry, S: tl.constexpr, C: tl.constexpr):
    """Every row moved on by one, `carry` (1, BD) first."""
    row = tl.arange(0, C)[:, None]
    out = ()
    for i in tl.static_range(S):
        source = tl.broadcast_to(tl.maximum(row - 1, 0), tiles[i].shape)
        out = out + (tl.where(row == 0, carry[i], tl.gather(tiles[i], source, 0)),)
    return out


@triton.jit
def bottom(tiles, S: tl.constexpr, C: tl.constexpr):
    """The last row (1, BD)."""
    row = tl.arange(0, C)[:, None]
    out = ()
    for i in tl.static_range(S):
        out = out + (tl.sum(tl.where(row == C - 1, tiles[i], 0.0), 0)[None, :],)
    return out


@triton.jit
def distance(ends, starts, real, S: tl.constexpr):
    """max |end - start| / max(1, |end|) where `real`; infinite where that is not a number."""
    worst = 0.0
    for i in tl.static_range(S):
        gap = tl.abs(ends[i] - starts[i]) / tl.maximum(tl.abs(ends[i]), 1.0)
        gap = tl.where(real, tl.where(gap == gap, gap, float("inf")), 0.0)
        worst = tl.maximum(worst, tl.max(tl.max(gap, 1), 0))
    return worst


@triton.jit
def newton(ends, nexts, maps, moved, S: tl.constexpr, C: tl.constexpr):
    """New starts s'_{c+1} = e_c + J_c (s'_c - s_c), from ends e_c, old starts s_{c+1} and `moved` = s'_0 - s_0; and how far
    the last of them moved. A chunk whose start was right passes its end on exactly, whatever its Jacobian: after k
    passes the first k chunks are right."""
    gaps = ()
    for i in tl.static_range(S):
        gaps = gaps + (ends[i] - nexts[i],)
    moves = chain(maps, gaps, moved, S)
    tamed = ()
    for i in tl.static_range(S):
        tamed = tamed + (tame(moves[i]),)
    steps = times(maps, shifted(tamed, moved, S, C), S, 1)
    new = ()
    for i in tl.static_range(S):
        new = new + (ends[i] + tame(steps[i]),)
    return new, bottom(tamed, S, C)
