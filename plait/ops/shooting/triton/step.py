"""A diagonal cell at a single token on the rows of a pool: its states are read once and written once."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch
from plait.ops.shooting.cells import Bound
from plait.ops.shooting.triton.cells import DEVICE, constants
from plait.ops.shooting.triton.tiles import read, write

UNITS = 128  # of a program


@kernel
def advance(
    states, rows, x, weights, h, info, states_b, x_b, x_g, x_h,
    S: tl.constexpr, G: tl.constexpr, W: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr,
    HEADS: tl.constexpr, K: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program does BD units of one token."""
    D: tl.constexpr = HEADS * K
    blocks: tl.constexpr = (D + BD - 1) // BD
    block, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    token = b.to(tl.int64)
    row = token if rows is None else tl.load(rows + b)
    unit = block * BD + tl.arange(0, BD)
    exists = unit < D
    s = read(states + row * states_b, unit, exists, S, D)
    w = read(weights, unit, exists, W, D)
    inputs = ()
    for i in tl.static_range(G):
        at = token * x_b + i * x_g + unit // K * x_h + unit % K
        inputs = inputs + (tl.load(x + at, mask=exists, other=0.0).to(tl.float32),)
    s = STEP(inputs, s, w, V)
    if tl.program_id(0) == 0:  # one pass, no gap, no fall-back
        number = tl.arange(0, 4)
        tl.store(info + number, tl.where(number == 0, 1.0, 0.0), mask=number < 3)
    write(states + row * states_b, unit, s, exists, S, D)
    tl.store(h + token * D + unit, s[0].to(h.dtype.element_ty), mask=exists)


def run(cell: Bound, x: Tensor, state: Tensor, rows: Tensor | None, out: Tensor, info: Tensor) -> None:
    """x (b, 1, g, h, k), state (n, s, h, k), out (b, 1, h, k), info (3); `rows` None: the rows of `state` are those of the
    call."""
    b, _, _, heads, k = x.shape
    numbers = [w.reshape(-1) for w in cell.tensors()]
    BD = min(UNITS, triton.next_power_of_2(heads * k))
    launch(
        advance, b * -(-heads * k // BD), state, rows, x,
        numbers[0] if len(numbers) == 1 else torch.cat(numbers), out, info, state.stride(0), x.stride(0), *x.stride()[2:4],
        **constants(cell.cell), STEP=DEVICE[type(cell.cell)].step, HEADS=heads, K=k, BD=BD, num_warps=4,
    )  # fmt: skip
