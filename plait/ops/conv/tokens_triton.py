"""The convolution over many tokens as Triton kernels, SiLU included: x is read once, and once more for the gradient.

A token's place in its row or document says which taps it has: `offsets` of packed documents, else its number in the row.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
# (it reads kernels as Python, in which triton's functions only raise)

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch

ROWS, CHANNELS = 64, 64  # of a tile
TILES = 8  # of a program of `back`, which sums over them what the weights get


@triton.jit
def places(offsets, token, tokens, all_tokens):
    """Each token's place in its sequence; past the end of all of them, one that has no tap."""
    at = token % tokens if offsets is None else tl.load(offsets + token, mask=token < all_tokens, other=0)
    return tl.where(token < all_tokens, at, -1)


@triton.jit
def filtered(x, weight, bias, token, at, d, x_t, D: tl.constexpr, W: tl.constexpr):
    """Before SiLU, in float32."""
    inside = (d < D)[None, :]
    total = tl.zeros([token.shape[0], d.shape[0]], tl.float32)
    if bias is not None:
        total += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(W):
        tap = tl.load(weight + d * W + (W - 1 - i), mask=d < D, other=0.0).to(tl.float32)
        there = x + (token[:, None] - i).to(tl.int64) * x_t + d[None, :]
        total += tl.load(there, mask=(at >= i)[:, None] & inside, other=0.0).to(tl.float32) * tap[None, :]
    return total


@kernel
def forth(
    x, weight, bias, offsets, y, tokens, n, x_t,
    D: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program does BT tokens of BD channels; n: tokens of all rows."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    token = tl.program_id(0) // blocks * BT + tl.arange(0, BT)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    z = filtered(x, weight, bias, token, places(offsets, token, tokens, n), d, x_t, D, W)
    if SILU:
        z *= tl.sigmoid(z)
    there = y + token[:, None].to(tl.int64) * D + d[None, :]
    tl.store(there, z.to(y.dtype.element_ty), mask=(token < n)[:, None] & (d < D)[None, :])


@kernel
def back(
    x, weight, bias, offsets, dy, dz, sums, tokens, n, x_t, dy_t,
    D: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """The gradient before SiLU, and what the weights get from TILES * BT tokens: sums (programs, W + 1, D), the bias's last."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    number, d = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = (d < D)[None, :]
    taps, tap = tl.zeros([BW, BD], tl.float32), tl.arange(0, BW)
    total = tl.zeros([BD], tl.float32)
    for tile in range(TILES):
        token = (number * TILES + tile) * BT + tl.arange(0, BT)
        at = places(offsets, token, tokens, n)
        alive = (token < n)[:, None] & inside
        g = tl.load(dy + token[:, None].to(tl.int64) * dy_t + d[None, :], mask=alive, other=0.0).to(tl.float32)
        if SILU:
            z = filtered(x, weight, bias, token, at, d, x_t, D, W)
            s = tl.sigmoid(z)
            g *= s * (1 + z * (1 - s))
            tl.store(dz + token[:, None].to(tl.int64) * D + d[None, :], g.to(dz.dtype.element_ty), mask=alive)
        total += tl.sum(g, 0)
        for i in tl.static_range(W):
            there = x + (token[:, None] - i).to(tl.int64) * x_t + d[None, :]
            seen = tl.load(there, mask=(at >= i)[:, None] & inside, other=0.0).to(tl.float32)
            taps += tl.where((tap == W - 1 - i)[:, None], tl.sum(g * seen, 0)[None, :], 0.0)
    here = sums + number.to(tl.int64) * (W + 1) * D + d
    tl.store(here[None, :] + tap[:, None] * D, taps, mask=(tap < W)[:, None] & inside)
    tl.store(here + W * D, total, mask=d < D)


@kernel
def spread(
    dz, weight, offsets, dx, tokens, n, dz_t,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient at x: what later tokens of the same sequence had of it."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    token = tl.program_id(0) // blocks * BT + tl.arange(0, BT)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    total = tl.zeros([BT, BD], tl.float32)
    for i in tl.static_range(W):
        at = places(offsets, token + i, tokens, n)
        tap = tl.load(weight + d * W + (W - 1 - i), mask=d < D, other=0.0).to(tl.float32)
        there = dz + (token[:, None] + i).to(tl.int64) * dz_t + d[None, :]
        total += tl.load(there, mask=(at >= i)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32) * tap[None, :]
    there = dx + token[:, None].to(tl.int64) * D + d[None, :]
    tl.store(there, total.to(dx.dtype.element_ty), mask=(token < n)[:, None] & (d < D)[None, :])


def run_forth(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor | None, y: Tensor, silu: bool) -> None:
    """x (b, t, d), its rows one after the other; y as x, in one piece."""
    (b, t, D), W = x.shape, weight.shape[1]
    launch(
        forth, -(-b * t // ROWS) * -(-D // CHANNELS), x, weight.contiguous(), bias, offsets, y, t, b * t, x.stride(1),
        D=D, W=W, SILU=silu, BT=ROWS, BD=CHANNELS, num_warps=4,
    )  # fmt: skip


def run_back(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor | None, dy: Tensor, dx: Tensor, silu: bool
) -> Tensor:
    """Writes dx; what the weights (w) and the bias (1) get is (w + 1, d), float32."""
    (b, t, D), W = x.shape, weight.shape[1]
    n, blocks, weight = b * t, -(-D // CHANNELS), weight.contiguous()
    programs = -(-n // (ROWS * TILES))
    sums = torch.empty(programs, W + 1, D, device=x.device)
    dz = torch.empty(b, t, D, dtype=x.dtype, device=x.device) if silu else dy
    launch(
        back, programs * blocks, x, weight, bias, offsets, dy, dz, sums, t, n, x.stride(1), dy.stride(1),
        D=D, W=W, SILU=silu, BT=ROWS, BD=CHANNELS, TILES=TILES, BW=triton.next_power_of_2(W), num_warps=4,
    )  # fmt: skip
    launch(
        spread, -(-n // ROWS) * blocks, dz, weight, offsets, dx, t, n, dz.stride(1),
        D=D, W=W, BT=ROWS, BD=CHANNELS, num_warps=4,
    )  # fmt: skip
    return sums.sum(0)
