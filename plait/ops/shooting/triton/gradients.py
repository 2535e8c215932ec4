"""Gradients: lambda_t = g_t + J_{t+1}^T lambda_{t+1} is linear, so no shape of kernel iterates."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch
from plait.ops.shooting.triton.joints import hand_back
from plait.ops.shooting.triton.plan import chunk_tables
from plait.ops.shooting.triton.states import Work
from plait.ops.shooting.triton.tiles import fetch, identity, lines, place, read, settled, steps_at, to_float32, write
from plait.ops.shooting.triton.vjp import back, gradients_at, states_at


@triton.jit
def steps_back(
    x, h, rest, dh, zero, here, there, mask, stride_g,
    G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ST: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """U steps from the one at `here` back: inputs, old states, gradient; the next step's; and so on."""
    loaded = ()
    for u in tl.static_range(U):
        loaded = loaded + steps_at(x, mask, stride_g, G, -ST, u, 1)
        loaded = loaded + states_at(h, rest, here, there, mask, S, D, 1 + u, 1)
        loaded = loaded + gradients_at(dh, zero, here - u * D, mask, D, 1)
    return loaded


@kernel
def retreat(
    x, h, rest, dh, h0, lams, weights, table, dx, dw, dstart, slopes,
    stride_b, stride_g, stride_h, dx_b, dx_g, dx_h, tokens,
    S: tl.constexpr, G: tl.constexpr, W: tl.constexpr, V: tl.constexpr, JACOBIAN: tl.constexpr, VJP: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr,
    ST: tl.constexpr, DT: tl.constexpr, U: tl.constexpr, STARTS: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """A program walks one item of `table` back for a block of channels, from the gradient `lams` at its end (by item; None
    is zero) to the one at its start, `dstart`, by item. It writes dx and sums dw; with `slopes` it writes neither, but the
    transposed Jacobian, by which a gradient at the end adds to `dstart`. STARTS: items are whole sequences.

    The first step apart, whose old state may be h0, loads come a block ahead, as in `advance`.
    """
    item, block, head, channel, unit, exists = place(tl.program_id(0), D, K, BD)
    batch = tl.load(table + item * 4).to(tl.int64)
    first = tl.load(table + item * 4 + 1).to(tl.int64)
    length = tl.load(table + item * 4 + 2)
    row = tl.load(table + item * 4 + 3)
    w = read(weights, unit, exists, W, D)
    zero = tl.zeros_like(w[0])
    begins = row >= 0
    if not STARTS:
        begins = tl.load(table + item * 4 - 1, mask=item > 0, other=-1) != row
    initial = read(h0 + row.to(tl.int64) * (S * D), unit, exists & begins, S, D)
    lam = (zero,) * S
    if lams is not None:
        lam = read(lams + item.to(tl.int64) * (S * D), unit, exists, S, D)
    total = (zero,) * W
    maps = identity(zero, S)
    MAPS: tl.constexpr = slopes is not None
    last = first + length - 1
    token = batch * tokens + last
    px = x + (batch * stride_b + last * ST + head.to(tl.int64) * stride_h)
    if FETCH > 0:
        lowest = tl.min(channel, 0)
        soon = lines(px + lowest - FETCH * U * ST, stride_g, -ST, G, U, BD)
        ahead = (token - FETCH * U) * D + head * K + lowest
        soon_h = lines(h + ahead - D, 0, -D, 1, U, BD)
        if dh is not None:
            soon_g = lines(dh + ahead, 0, -D, 1, U, BD)
        if S > 1:
            soon_s = lines(
                rest + (token - FETCH * U - 1) * ((S - 1) * D) + head * K + lowest, D, -(S - 1) * D, S - 1, U, BD
            )
    px += channel
    pd = dx + (batch * dx_b + last * DT + head.to(tl.int64) * dx_h) + channel if not MAPS else px
    here = token * D + unit
    there = token * ((S - 1) * D) + unit
    mask = None if EVEN else exists
    whole = (length - 1) // U * U
    N: tl.constexpr = G + S + 1
    now = steps_back(px, h, rest, dh, zero, here, there, exists & (whole > 0), stride_g, G, S, D, ST, U)
    now = settled(now, U * N)
    for t in range(0, whole, U):
        more = tl.where(t + 2 * U <= whole, U, 0).to(tl.int64)
        px -= more * ST
        here -= more * D
        there -= more * ((S - 1) * D)
        after = steps_back(px, h, rest, dh, zero, here, there, mask, stride_g, G, S, D, ST, U)
        if FETCH > 0:
            if t + (FETCH + 1) * U <= whole:
                fetch(soon)
                fetch(soon_h)
                if dh is not None:
                    fetch(soon_g)
                if S > 1:
                    fetch(soon_s)
            soon -= U * ST * (x.dtype.element_ty.primitive_bitwidth // 8)
            soon_h -= U * D * (h.dtype.element_ty.primitive_bitwidth // 8)
            if dh is not None:
                soon_g -= U * D * (h.dtype.element_ty.primitive_bitwidth // 8)
            if S > 1:
                soon_s -= U * (S - 1) * D * 4
        for u in tl.static_range(U):
            lam, total, maps = back(
                now[u * N : u * N + G], now[u * N + G : u * N + G + S], now[u * N + G + S], lam, total, maps, w,
                pd - u * DT, dx_g, mask, S, G, W, V, JACOBIAN, VJP, MAPS,
            )  # fmt: skip
        pd -= U * DT
        now = settled(after, U * N)
    done = tl.where(whole > 0, U, 0).to(tl.int64)
    px -= done * ST
    here -= done * D
    there -= done * ((S - 1) * D)
    for t in range(whole, length):
        inputs = to_float32(steps_at(px, exists, stride_g, G, -ST, 0, 1), 0, G)
        at = exists & ((t + 1 < length) | (not begins))
        old = to_float32(states_at(h, rest, here, there, at, S, D, 1, 1), 0, S)
        states = ()
        for i in tl.static_range(S):
            states = states + (tl.where(at, old[i], initial[i]),)
        gradient = gradients_at(dh, zero, here, exists, D, 1)
        lam, total, maps = back(
            inputs, states, gradient[0], lam, total, maps, w, pd, dx_g, exists, S, G, W, V, JACOBIAN, VJP, MAPS
        )
        px -= ST
        pd -= DT
        here -= D
        there -= (S - 1) * D
    if dstart is not None:
        write(dstart + item.to(tl.int64) * (S * D), unit, lam, exists, S, D)
    if MAPS:
        write(slopes + item.to(tl.int64) * (S * S * D), unit, maps, exists, S * S, D)
    else:
        write(dw + item.to(tl.int64) * (W * D), unit, total, exists, W, D)


class Gradients:
    """What a backward call reads and fills; `lams` are the gradients at the final states or None."""

    def __init__(self, work: Work, h0: Tensor, h: Tensor, rest: Tensor, dh: Tensor | None, lams: Tensor | None) -> None:
        self.work, self.h0, self.h, self.rest, self.dh, self.lams = work, h0, h, rest, dh, lams
        self.dx = torch.empty_like(work.x)

    def retreat(
        self, table: Tensor, lams: Tensor | None, dstart: Tensor | None, dw: Tensor | None, slopes: Tensor | None
    ) -> None:
        work, x, dx = self.work, self.work.x, self.dx
        launch(
            retreat, len(table) * work.at.blocks,
            x, self.h, self.rest, self.dh, self.h0, lams, work.weights, table, dx, dw, dstart, slopes,
            x.stride(0), x.stride(2), x.stride(3), dx.stride(0), dx.stride(2), dx.stride(3), x.shape[1],
            JACOBIAN=work.device.jacobian, VJP=work.device.vjp, DT=dx.stride(1),
            U=work.steps, STARTS=table is work.table, FETCH=work.fetch, **work.constants,
        )  # fmt: skip

    def sequential(self) -> tuple[Tensor, Tensor]:
        """-> dh0 (n, s, d) and dw (items, w, d)."""
        work = self.work
        n = len(work.rows)
        dh0, dw = work.empty(n, work.states), work.empty(n, work.sizes["W"])
        self.retreat(work.table, self.lams, dh0, dw, None)
        return dh0, dw

    def grid(self) -> tuple[Tensor, Tensor]:
        """All chunks' maps, the gradients at their ends, and then as if each were a sequence."""
        work, at, s = self.work, self.work.at, self.work.states
        tables = chunk_tables(work.rows, work.plan.L, work.plan.W, self.h.device)
        chunks, n = len(tables.chunks), len(work.rows)
        adds, maps, lams = work.empty(chunks, s), work.empty(chunks, s * s), work.empty(chunks, s)
        dh0, dw = work.empty(n, s), work.empty(chunks, work.sizes["W"])
        self.retreat(tables.chunks, None, adds, None, maps)
        launch(
            hand_back, n * at.blocks, lams, adds, maps, self.lams, dh0, tables.ranges,
            S=s, D=at.D, K=at.K, BD=at.BD, C=work.plan.C, num_warps=work.joint_warps,
        )  # fmt: skip
        self.retreat(tables.chunks, lams, None, dw, None)
        return dh0, dw
