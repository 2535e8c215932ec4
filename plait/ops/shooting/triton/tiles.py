"""Pieces that all kernels share: addresses, loads, small matrices kept as flat tuples of tiles."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import triton
import triton.language as tl


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
def wide(tiles, FIRST: tl.constexpr, N: tl.constexpr):
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
