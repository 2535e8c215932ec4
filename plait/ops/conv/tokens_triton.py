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
STEPS, WALKED, WARPS = (
    128,
    256,
    2,
)  # tokens and channels of a program of `back`, which sums what the weights get from them


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


@triton.jit
def token_of(x, token, t_stride, all_tokens, d, D: tl.constexpr):
    """A token's channels; zeros outside of what there is."""
    there = (token >= 0) & (token < all_tokens)
    return tl.load(x + token.to(tl.int64) * t_stride + d, mask=there & (d < D), other=0.0).to(tl.float32)


@kernel
def back(
    x, weight, bias, offsets, dy, dx, sums, tokens, n, x_t, dy_t,
    D: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient at x, and what the weights get from STEPS tokens: sums (programs, W + 1, D), the bias's last.

    A program walks along its tokens, and W - 1 further, with what the filter sees and what is due to earlier tokens in
    registers. The next token is read while this one is worked on.
    """
    blocks: tl.constexpr = (D + BD - 1) // BD
    number, d = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    start = number * STEPS
    zero = tl.zeros([BD], tl.float32)
    none = zero
    if bias is not None:
        none += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    w, seen, due, taps, total = (), (), (zero,), (zero,) * W, zero  # w, seen, due: by how many tokens back
    for i in tl.static_range(W):
        w = w + (tl.load(weight + d * W + (W - 1 - i), mask=d < D, other=0.0).to(tl.float32),)
    for i in tl.static_range(1, W):
        seen, due = seen + (token_of(x, start - i, x_t, n, d, D),), due + (zero,)
    next_x, next_dy = token_of(x, start, x_t, n, d, D), token_of(dy, start, dy_t, n, d, D)
    for step in range(STEPS + W - 1):
        token = start + step
        at = places(offsets, token, tokens, n)
        seen, g = (next_x,) + seen, next_dy
        next_x, next_dy = token_of(x, token + 1, x_t, n, d, D), token_of(dy, token + 1, dy_t, n, d, D)
        if SILU:
            z = none
            for i in tl.static_range(W):
                z += tl.where(at >= i, seen[i], 0.0) * w[i]
            s = tl.sigmoid(z)
            g *= s * (1 + z * (1 - s))
        mine = tl.where(step < STEPS, g, 0.0)  # what is further is other programs' to count
        total += mine
        for i in tl.static_range(W):
            reached = at >= i
            taps = taps[:i] + (taps[i] + tl.where(reached, mine * seen[i], 0.0),) + taps[i + 1 :]
            due = due[:i] + (due[i] + tl.where(reached, g * w[i], 0.0),) + due[i + 1 :]
        done = token - (W - 1)
        there = dx + done.to(tl.int64) * D + d
        tl.store(there, due[W - 1].to(dx.dtype.element_ty), mask=(done >= start) & (done < n) & (d < D))
        seen, due = seen[: W - 1], (zero,) + due[: W - 1]
    here = sums + number.to(tl.int64) * (W + 1) * D + d
    for i in tl.static_range(W):
        tl.store(here + (W - 1 - i) * D, taps[i], mask=d < D)
    tl.store(here + W * D, total, mask=d < D)


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
    n, programs = b * t, -(-b * t // STEPS)
    BD = min(WALKED, triton.next_power_of_2(D))
    sums = torch.empty(programs, W + 1, D, device=x.device)
    launch(
        back, programs * -(-D // BD), x, weight.contiguous(), bias, offsets, dy, dx, sums, t, n, x.stride(1), dy.stride(1),
        D=D, W=W, SILU=silu, STEPS=STEPS, BD=BD, num_warps=WARPS,
    )  # fmt: skip
    return sums.sum(0)
