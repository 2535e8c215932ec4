"""The elementwise recurrence as Triton kernels: every number is read once and written once.

A program goes through the tokens of some channels in tiles. Within a tile an associative scan gives each token's product of
all a so far and the state from nothing; what stood before the tile, times that product, is added. The gradient is the same
from the last token to the first: g_t = dy_t + a_{t+1} g_{t+1}, db = g, da_t = g_t s_{t-1}.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch

TOKENS, CHANNELS = 64, 32  # of a tile


@triton.jit
def then(a1, b1, a2, b2):
    """s -> a1 s + b1, and a2 times that + b2."""
    return a1 * a2, tl.fma(a2, b1, b2)


@triton.jit
def row_of(x, i, which):
    """One row of a tile, as a row."""
    return tl.sum(tl.where(i == which, x, 0.0), 0)[None, :]


@kernel
def forth(a, b, s, y, tokens, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """A program does BD channels of one row of the batch."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i, d = tl.arange(0, BT)[:, None], (tl.program_id(0) % blocks * BD + tl.arange(0, BD))[None, :]
    state = tl.load(s + row * D + d, mask=d < D, other=0.0)
    for start in range(0, tokens, BT):
        there = (row * tokens + start + i) * D + d
        exists = (start + i < tokens) & (d < D)
        kept = tl.load(a + there, mask=exists, other=1.0)
        added = tl.load(b + there, mask=exists, other=0.0)
        kept, added = tl.associative_scan((kept, added), 0, then)
        states = tl.fma(kept, state, added)
        tl.store(y + there, states, mask=exists)
        state = row_of(states, i, BT - 1)


@kernel
def back(dy, a, states, s, da, db, tokens, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """The same, from the last tile to the first."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i, d = tl.arange(0, BT)[:, None], (tl.program_id(0) % blocks * BD + tl.arange(0, BD))[None, :]
    first = tl.load(s + row * D + d, mask=d < D, other=0.0)
    g = tl.zeros([1, BD], tl.float32)
    tiles = (tokens + BT - 1) // BT
    for step in range(0, tiles):
        t = (tiles - 1 - step) * BT + i
        there = (row * tokens + t) * D + d
        exists = (t < tokens) & (d < D)
        kept = tl.load(a + there + D, mask=(t + 1 < tokens) & (d < D), other=0.0)  # by the token that comes next
        reached = tl.load(dy + there, mask=exists, other=0.0)
        kept, reached = tl.associative_scan((kept, reached), 0, then, reverse=True)
        gradient = tl.fma(kept, g, reached)
        before = tl.load(states + there - D, mask=exists & (t > 0), other=0.0) + tl.where(t == 0, first, 0.0)
        tl.store(db + there, gradient, mask=exists)
        tl.store(da + there, gradient * before, mask=exists)
        g = row_of(gradient, i, 0)


def forward(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """Shapes as in `plait.ops.scan.chunked.scanned`; all float32."""
    y = torch.empty(b.shape, device=b.device)
    _launch(forth, b, a, b, s, y)
    return y


def backward(dy: Tensor, a: Tensor, states: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients at a and b."""
    da, db = (torch.empty(a.shape, device=a.device) for _ in "ab")
    _launch(back, a, dy, a, states, s, da, db)
    return da, db


def _launch(run, like: Tensor, *tensors: Tensor) -> None:
    (b, t), D = like.shape[:2], like[0, 0].numel() if like.numel() else 0
    if b * t * D:
        BD = min(CHANNELS, triton.next_power_of_2(D))
        launch(run, b * -(-D // BD), *(x.contiguous() for x in tensors), t, D=D, BT=TOKENS, BD=BD, num_warps=4)
