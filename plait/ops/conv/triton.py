"""The convolution at a single token on the rows of a pool, as a Triton kernel: a weighted sum, and the tail moves on by one."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import triton
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch

CHANNELS = 256  # of a program


@kernel
def advance(
    tails, rows, x, weight, bias, y, tails_b, tails_t, x_b,
    D: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program does BD channels of one token."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    block, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    token = b.to(tl.int64)
    row = token if rows is None else tl.load(rows + b)
    d = block * BD + tl.arange(0, BD)
    here = tails + row * tails_b + d
    new = tl.load(x + token * x_b + d, mask=d < D, other=0.0)
    total = new.to(tl.float32) * tl.load(weight + d * W + W - 1, mask=d < D, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    for i in tl.static_range(W - 1):
        old = tl.load(here + i * tails_t, mask=d < D, other=0.0)
        total += old.to(tl.float32) * tl.load(weight + d * W + i, mask=d < D, other=0.0).to(tl.float32)
        if i > 0:
            tl.store(here + (i - 1) * tails_t, old, mask=d < D)
    tl.store(here + (W - 2) * tails_t, new.to(tails.dtype.element_ty), mask=d < D)
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(y + token * D + d, total.to(y.dtype.element_ty), mask=d < D)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    rows: Tensor | None,
    out: Tensor,
    silu: bool = False,
) -> None:
    """Shapes as in `causal_conv` with t = 1; `rows` None: the rows of `state` are those of the call. silu: of the outputs."""
    (b, _, D), W = x.shape, weight.shape[1]
    x, weight = x if x.stride(-1) == 1 else x.contiguous(), weight.contiguous()
    BD = min(CHANNELS, triton.next_power_of_2(D))
    launch(
        advance, b * -(-D // BD), state, rows, x, weight, bias, out, *state.stride()[:2], x.stride(0),
        D=D, W=W, SILU=silu, BD=BD, num_warps=4,
    )  # fmt: skip
