"""What is done number by number between products, as one Triton kernel each; in float32 inside."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import triton
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch

BLOCK = 512  # channels of a program


@kernel
def _swiglu(hidden, y, hidden_b, H: tl.constexpr, BLOCK: tl.constexpr):
    blocks: tl.constexpr = (H + BLOCK - 1) // BLOCK
    row, c = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(hidden + row * hidden_b + c, mask=c < H, other=0.0).to(tl.float32)
    up = tl.load(hidden + row * hidden_b + H + c, mask=c < H, other=0.0).to(tl.float32)
    tl.store(y + row * H + c, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=c < H)


def swiglu(hidden: Tensor, out: Tensor) -> None:
    """hidden (n, 2 h), out (n, h)."""
    n, H = out.shape
    block = min(BLOCK, triton.next_power_of_2(H))
    launch(_swiglu, n * -(-H // block), hidden, out, hidden.stride(0), H=H, BLOCK=block, num_warps=4)


@kernel
def _swiglu_gradient(hidden, dy, dhidden, hidden_b, dy_b, H: tl.constexpr, BLOCK: tl.constexpr):
    blocks: tl.constexpr = (H + BLOCK - 1) // BLOCK
    row, c = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(hidden + row * hidden_b + c, mask=c < H, other=0.0).to(tl.float32)
    up = tl.load(hidden + row * hidden_b + H + c, mask=c < H, other=0.0).to(tl.float32)
    d = tl.load(dy + row * dy_b + c, mask=c < H, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    there = dhidden + row * (2 * H) + c
    tl.store(there, (d * up * s * (1 + gate * (1 - s))).to(dhidden.dtype.element_ty), mask=c < H)
    tl.store(there + H, (d * gate * s).to(dhidden.dtype.element_ty), mask=c < H)


def swiglu_gradient(hidden: Tensor, dy: Tensor, out: Tensor) -> None:
    """hidden and out (n, 2 h), dy (n, h)."""
    n, H = dy.shape
    block = min(2 * BLOCK, triton.next_power_of_2(H))
    launch(
        _swiglu_gradient, n * -(-H // block), hidden, dy, out, hidden.stride(0), dy.stride(0), H=H, BLOCK=block, num_warps=4
    )  # fmt: skip


@kernel
def _rotate(
    x, cos, sin, y, tokens, x_b, x_t, x_h,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A program turns one head of one token; R pairs, and what stands after them as it is."""
    head, token = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    here = x + token // tokens * x_b + token % tokens * x_t + head * x_h
    there = y + (token * H + head) * K
    i = tl.arange(0, BR)
    c = tl.load(cos + token * R + i, mask=i < R, other=0.0).to(tl.float32)
    s = tl.load(sin + token * (2 * R) + R + i, mask=i < R, other=0.0).to(tl.float32)
    first = tl.load(here + i, mask=i < R, other=0.0).to(tl.float32)
    second = tl.load(here + R + i, mask=i < R, other=0.0).to(tl.float32)
    tl.store(there + i, (first * c - second * s).to(y.dtype.element_ty), mask=i < R)
    tl.store(there + R + i, (second * c + first * s).to(y.dtype.element_ty), mask=i < R)
    if 2 * R < K:
        k = tl.arange(0, BK)
        tl.store(there + k, tl.load(here + k, mask=(k >= 2 * R) & (k < K), other=0.0), mask=(k >= 2 * R) & (k < K))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Shapes as in `plait.ops.rotary.rotate`."""
    (b, t, H, K), R = x.shape, cos.shape[-1]
    launch(
        _rotate, b * t * H, x, cos, sin, out, t, *x.stride()[:3],
        H=H, K=K, R=R, BR=triton.next_power_of_2(R), BK=triton.next_power_of_2(K), num_warps=1,
    )  # fmt: skip
