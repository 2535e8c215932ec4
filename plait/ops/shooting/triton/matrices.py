"""Recurrences with a matrix per head on the GPU: chunks as a batch, a matrix product and one kernel per step.

The products run in x's dtype (bfloat16 ones on the tensor cores, accumulated in float32, as cuDNN's do); states and gates are
float32. An `Engine` of plait.ops.shooting.chunked, which closes the joints.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.ops.kernels import Call
from plait.ops.launch import kernel, launch
from plait.ops.shooting import cells
from plait.ops.shooting.cells import Bound
from plait.ops.shooting.chunked import Back, Engine
from plait.ops.shooting.triton.cells import DEVICE, gru_gates, gru_new, variant

BLOCK = 512
ROWS = 1024
SHORTEST = 32  # steps of a chunk: a cell that forgets does so within half of it


@triton.jit
def _tiles(pointer, offsets, stride, exists, N: tl.constexpr):
    out = ()
    for i in tl.static_range(N):
        out = out + (tl.load(pointer + i * stride + offsets, mask=exists, other=0.0).to(tl.float32),)
    return out


@triton.jit
def _place(D: tl.constexpr, K: tl.constexpr, G: tl.constexpr, total, mh, BLOCK: tl.constexpr):
    """Row and unit of each element, and where it lies in m (h, n, g, k)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, unit = at // D, at % D
    return row, unit, (unit // K) * mh + row * (G * K) + unit % K, at < total


@triton.jit
def _mixed(s, S: tl.constexpr):
    """The states with 1 for h: with m as weights, m times h is then m itself."""
    out = (tl.zeros_like(s[0]) + 1.0,)
    for i in tl.static_range(1, S):
        out = out + (s[i],)
    return out


@kernel
def _advance(x, m, before, after, h, total, mh, D: tl.constexpr, K: tl.constexpr, S: tl.constexpr, G: tl.constexpr,
             V: tl.constexpr, STEP: tl.constexpr, IS_GRU: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """x (n, g, d), m (h, n, g, k), before and after (n, s, d), h (n, d) in m's dtype."""
    row, unit, at_m, exists = _place(D, K, G, total, mh, BLOCK)
    xs = _tiles(x, row * (G * D) + unit, D, exists, G)
    ms = _tiles(m, at_m, K, exists, G)
    s = _tiles(before, row * (S * D) + unit, D, exists, S)
    if IS_GRU:
        z, r, mixed, half = gru_gates(xs, _mixed(s, S), ms)
        new = (gru_new(s[0], z, half),)
    else:
        new = STEP(xs, _mixed(s, S), ms, V)
    for i in tl.static_range(S):
        tl.store(after + row * (S * D) + i * D + unit, new[i], mask=exists)
    tl.store(h + row * D + unit, new[0], mask=exists)


@triton.jit
def _gru_vjp(x, m, s, lam):
    z, r, mixed, half = gru_gates(x, _mixed(s, 1), m)
    c = 2.0 * half - 1.0
    dz = lam[0] * ((c - s[0]) * (z * (1.0 - z)))
    dc = lam[0] * (z * (1.0 - c * c))
    dr = dc * (mixed * (r * (1.0 - r)))
    return (lam[0] * (1.0 - z),), (dz, dr, dc), (dz, dr, dc * r)


@kernel
def _retreat(g, mu, mixed, x, m, before, mu_new, dx, dm, total, n, mh, D: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
             G: tl.constexpr, V: tl.constexpr, VJP: tl.constexpr, IS_GRU: tl.constexpr, MIXED: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """g, mu, mu_new (n, s, d): the gradient at new and old states, less what comes through the matrix: mixed (h, n, k),
    already multiplied for the new states; for the old ones dm (h, n, g, k) is yet to be."""
    row, unit, at_m, exists = _place(D, K, G, total, mh, BLOCK)
    states = row * (S * D) + unit
    lam = ()
    for i in tl.static_range(S):
        value = tl.load(g + states + i * D, mask=exists, other=0.0) + tl.load(
            mu + states + i * D, mask=exists, other=0.0
        )
        if MIXED and i == 0:
            value += tl.load(mixed + (unit // K) * (n * K) + row * K + unit % K, mask=exists, other=0.0).to(tl.float32)
        lam = lam + (value,)
    xs = _tiles(x, row * (G * D) + unit, D, exists, G)
    ms = _tiles(m, at_m, K, exists, G)
    s = _tiles(before, states, D, exists, S)
    if IS_GRU:
        old, dxs, dms = _gru_vjp(xs, ms, s, lam)
    else:
        old, dxs, dms = VJP(xs, _mixed(s, S), ms, lam, V)
        old = _without_mixing(old, S)
    for i in tl.static_range(S):
        tl.store(mu_new + states + i * D, old[i], mask=exists)
    for i in tl.static_range(G):
        tl.store(dx + row * (G * D) + i * D + unit, dxs[i], mask=exists)
        tl.store(dm + at_m + i * K, dms[i], mask=exists)


@triton.jit
def _without_mixing(old, S: tl.constexpr):
    """The old output is read through the matrix only."""
    out = (tl.zeros_like(old[0]),)
    for i in tl.static_range(1, S):
        out = out + (old[i],)
    return out


def supports(call: Call) -> str | None:
    """None, or why these kernels do not fit the call."""
    if call.sizes.cell not in DEVICE:
        return f"no kernel for {call.sizes.cell.__name__}"
    if call.sizes.weights:
        return "peepholes beside a matrix"
    return None if call.dtype in (torch.bfloat16, torch.float16, torch.float32) else f"no kernel for {call.dtype}"


class _Shape:
    """What both ways share: the matrices in x's dtype, the launch, and m for many rows."""

    def __init__(self, cell: Bound, x: Tensor):
        self.g, self.heads, self.k, _ = cell.recurrent.shape
        self.states, self.d = len(cell.cell.states), self.heads * self.k
        columns = cell.recurrent.permute(1, 3, 0, 2).reshape(self.heads, self.k, -1)
        self.columns = columns.to(x.dtype)  # (h, k, g k): m = h R^T
        self.bias = None if cell.bias is None else cell.bias.transpose(0, 1).reshape(self.heads, 1, -1).to(x.dtype)
        self.device = DEVICE[type(cell.cell)]
        self.options = {
            "D": self.d, "K": self.k, "S": self.states, "G": self.g, "V": variant(cell.cell),
            "IS_GRU": type(cell.cell) is cells.GRU, "BLOCK": BLOCK,
        }  # fmt: skip

    def mix(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        """h (n, h, k) -> m (h, n, g k)."""
        rows = h.transpose(0, 1)
        if self.bias is None:
            return torch.bmm(rows, self.columns, out=out)
        return torch.baddbmm(self.bias, rows, self.columns, out=out)

    def programs(self, n: int) -> int:
        return -(-n * self.d // BLOCK)


def run(cell: Bound, x: Tensor, s: Tensor) -> Tensor:
    """As `chunked.run`: x (c, n, g, h, k), starts s (n, s, h, k) -> states (c, n, s, h, k) float32."""
    shape, n = _Shape(cell, x), x.shape[1]
    x, before = x.contiguous(), s.float().contiguous()
    states = before.new_empty(len(x), *before.shape)
    h = before[:, 0].to(x.dtype, copy=True).contiguous()
    m = x.new_empty(shape.heads, n, shape.g * shape.k)
    for tokens, after in zip(x.unbind(0), states.unbind(0), strict=True):
        shape.mix(h, m)
        launch(
            _advance, shape.programs(n), tokens, m, before, after, h, n * shape.d, n * shape.g * shape.k,
            STEP=shape.device.step, **shape.options,
        )  # fmt: skip
        before = after
    return states


class MatrixBack(Back):
    """As `chunked.Back`, without derivatives kept for every token: the kernel makes them anew from x, m and the states."""

    def __init__(self, cell: Bound, x: Tensor, before: Tensor):
        self.cell, self.x, self.before = cell, x.contiguous(), before.contiguous()
        self.shape = _Shape(cell, x)
        c, n = x.shape[:2]
        h = before[:, :, 0].to(x.dtype).flatten(0, 1)  # (c n, h, k)
        self.h, self.m = h, self.shape.mix(h).view(self.shape.heads, c, n, -1)
        self.dx, self.dm = torch.empty_like(self.x), torch.empty_like(self.m)

    def run(self, g: Tensor, mu: Tensor, steps: int) -> Tensor:
        shape, n, g = self.shape, self.x.shape[1], g.contiguous()
        rows = shape.columns.mT.contiguous()  # (h, g k, k)
        mixed = self.x.new_empty(shape.heads, n, shape.k)
        new, old = torch.empty_like(mu), mu.contiguous()
        for t in reversed(range(steps)):
            launch(
                _retreat, shape.programs(n),
                g[t], old, mixed, self.x[t], self.m[:, t], self.before[t], new, self.dx[t], self.dm[:, t],
                n * shape.d, n, self.m.stride(0), VJP=shape.device.vjp, MIXED=t + 1 < steps, **shape.options,
            )  # fmt: skip
            torch.bmm(self.dm[:, t], rows, out=mixed)
            old, new = new, torch.empty_like(mu) if t + 1 == steps else old
        old[:, 0] += mixed.transpose(0, 1)
        return old

    def products(self) -> Tensor:
        """Rare: only where joints stay open, so by the elementwise derivatives of the torch form."""
        return Back(self.cell, self.x.float(), self.before).products()

    def pull(self) -> tuple[Tensor, list[Tensor]]:
        shape = self.shape
        dm, h = self.dm.flatten(1, 2), self.h.transpose(0, 1)  # (h, c n, g k), (h, c n, k)
        dR = torch.bmm(dm.mT, h).float().view(shape.heads, shape.g, shape.k, shape.k).transpose(0, 1)
        if self.cell.bias is None:
            return self.dx, [dR.contiguous()]
        return self.dx, [
            dR.contiguous(),
            dm.float().sum(1).view(shape.heads, shape.g, shape.k).transpose(0, 1).contiguous(),
        ]


def chunk_size(length: int, tokens: int, numbers: int) -> int:
    """As few steps as give a product of about ROWS rows, which is what fills the chip."""
    return max(SHORTEST, tokens // ROWS)


MATRICES = Engine(run, MatrixBack, chunk_size)
