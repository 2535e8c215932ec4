"""States from inputs: step by step, or a grid of chunks."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

from functools import cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch
from plait.ops.shooting.cells import Bound
from plait.ops.shooting.triton.cells import DEVICE, constants
from plait.ops.shooting.triton.joints import close
from plait.ops.shooting.triton.plan import Layout, Plan, Spans, chunk_tables, row_table
from plait.ops.shooting.triton.tiles import (
    fetch,
    identity,
    lines,
    place,
    read,
    settled,
    steps_at,
    times,
    to_float32,
    write,
)

FETCH = 4  # blocks: some 3000 cycles, three times what memory takes


# --- one step after the other


@kernel
def advance(
    x, h, rest, starts, ends, slopes, weights, table, gaps, tol,
    stride_b, stride_g, stride_h, tokens,
    S: tl.constexpr, G: tl.constexpr, W: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr, JACOBIAN: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr,
    ST: tl.constexpr, U: tl.constexpr, BY_ROW: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """A program runs one item of `table` (a sequence, or a chunk of one) for a block of channels.

    It starts from `starts`, by the item's sequence (`BY_ROW`) or its own, and leaves its `ends`. With `h` it writes what
    it passes; with `slopes`, the Jacobian of end by start. With `gaps` (sequence, block) it only runs where the gap is
    not closed. Steps go in blocks of U, during which the next block is loaded; FETCH
    blocks ahead go into a cache, for when too few warps run to wait for memory.
    """
    item, block, head, channel, unit, exists = place(tl.program_id(0), D, K, BD)
    batch = tl.load(table + item * 4).to(tl.int64)
    first = tl.load(table + item * 4 + 1).to(tl.int64)
    length = tl.load(table + item * 4 + 2)
    row = tl.load(table + item * 4 + 3)
    if gaps is not None:
        blocks: tl.constexpr = (D // K) * ((K + BD - 1) // BD)
        if tl.load(gaps + row * blocks + block) <= tol:
            return
    origin = row if BY_ROW else item
    s = read(starts + origin.to(tl.int64) * (S * D), unit, exists, S, D)
    w = read(weights, unit, exists, W, D)
    token = batch * tokens + first
    px = x + (batch * stride_b + first * ST + head.to(tl.int64) * stride_h)
    if FETCH > 0:
        soon = lines(px + tl.min(channel, 0) + FETCH * U * ST, stride_g, ST, G, U, BD)
    px += channel
    here = token * D + unit
    there = token * ((S - 1) * D) + unit
    j = identity(s[0], S)
    mask = None if EVEN else exists
    whole = length // U * U
    now = settled(steps_at(px, exists & (whole > 0), stride_g, G, ST, 0, U), U * G)
    for t in range(0, whole, U):
        px += tl.where(t + 2 * U <= whole, U * ST, 0)  # the last block is read again
        after = steps_at(px, mask, stride_g, G, ST, 0, U)
        if FETCH > 0:
            if t + (FETCH + 1) * U <= whole:
                fetch(soon)
            soon += U * ST * (x.dtype.element_ty.primitive_bitwidth // 8)
        for u in tl.static_range(U):
            if slopes is not None:
                s, by = JACOBIAN(now[u * G : (u + 1) * G], s, w, V)
                j = times(by, j, S, S)
            else:
                s = STEP(now[u * G : (u + 1) * G], s, w, V)
            if h is not None:
                tl.store(h + here + u * D, s[0].to(h.dtype.element_ty), mask=mask)
                for i in tl.static_range(1, S):
                    tl.store(rest + there + (u * (S - 1) + i - 1) * D, s[i], mask=mask)
        here += U * D
        there += U * (S - 1) * D
        now = settled(after, U * G)
    px += tl.where(whole > 0, U * ST, 0)
    for _ in range(whole, length):
        token_x = steps_at(px, exists, stride_g, G, ST, 0, 1)
        px += ST
        if slopes is not None:
            s, by = JACOBIAN(to_float32(token_x, 0, G), s, w, V)
            j = times(by, j, S, S)
        else:
            s = STEP(to_float32(token_x, 0, G), s, w, V)
        if h is not None:
            tl.store(h + here, s[0].to(h.dtype.element_ty), mask=exists)
            for i in tl.static_range(1, S):
                tl.store(rest + there + (i - 1) * D, s[i], mask=exists)
        here += D
        there += (S - 1) * D
    write(ends + item.to(tl.int64) * (S * D), unit, s, exists, S, D)
    if slopes is not None:
        write(slopes + item.to(tl.int64) * (S * S * D), unit, j, exists, S * S, D)


# --- the host's side


class Work:
    """Everything that the launches of one call share."""

    def __init__(self, cell: Bound, x: Tensor, rows: Spans, plan: Plan, at: Layout) -> None:
        self.x, self.rows, self.plan, self.at = x, rows, plan, at
        self.device = DEVICE[type(cell.cell)]
        self.sizes = constants(cell.cell)
        self.states, self.units = self.sizes["S"], at.D
        numbers = [w.reshape(-1) for w in cell.tensors()]
        self.weights = numbers[0] if len(numbers) == 1 else torch.cat(numbers)
        self.steps = (
            plan.U if self.states < 3 else max(1, plan.U // 2)
        )  # a third state's operations double compile time
        self.joint_warps = 4 if self.states < 3 else 8  # 3 x 3 maps need the registers
        self.fetch = FETCH if plan.kind == "sequential" else 0
        self.table = row_table(rows, x.device)

    def empty(self, *shape: int) -> Tensor:
        return self.x.new_empty(*shape, self.units, dtype=torch.float32)

    @cached_property
    def constants(self) -> dict[str, Any]:
        return self.sizes | self.at.constants() | {"ST": self.x.stride(1), "num_warps": self.plan.num_warps}


def run_rows(
    work: Work, h: Tensor, rest: Tensor, start: Tensor, final: Tensor, gaps: Tensor | None, tol: float
) -> None:
    """Sequences as they are; with `gaps`, only blocks that are still open."""
    _advance(work, work.table, start, final, h, rest, None, gaps, tol, by_row=True)


def _advance(
    work: Work, table: Tensor, starts: Tensor, ends: Tensor, h: Tensor | None = None, rest: Tensor | None = None,
    slopes: Tensor | None = None, gaps: Tensor | None = None, tol: float = 0.0, *, by_row: bool,
) -> None:  # fmt: skip
    x, at = work.x, work.at
    launch(
        advance, len(table) * at.blocks, x, h, rest, starts, ends, slopes, work.weights, table, gaps, tol,
        x.stride(0), x.stride(2), x.stride(3), x.shape[1],
        STEP=work.device.step, JACOBIAN=work.device.jacobian, U=work.steps, BY_ROW=by_row, FETCH=work.fetch,
        **work.constants,
    )  # fmt: skip


def sequential(
    work: Work, h: Tensor, rest: Tensor, start: Tensor, final: Tensor, tol: float, max_passes: int
) -> Tensor:
    """No chunks, no gap."""
    run_rows(work, h, rest, start, final, None, 0.0)
    return torch.eye(1, 3, dtype=torch.float32, device=h.device)[0]


def grid(work: Work, h: Tensor, rest: Tensor, start: Tensor, final: Tensor, tol: float, max_passes: int) -> Tensor:
    """Passes over all chunks at once, every one of which writes, until each block of channels has closed its gaps."""
    plan, at = work.plan, work.at
    tables = chunk_tables(work.rows, plan.L, plan.W, h.device)
    chunks, n = len(tables.chunks), len(work.rows)
    starts, ends = work.empty(chunks, work.states), work.empty(chunks, work.states)
    slopes = work.empty(chunks, work.states**2)
    gaps = h.new_full((n * at.blocks,), float("inf"), dtype=torch.float32)
    info = h.new_zeros(3, dtype=torch.float32)
    _advance(work, tables.burn, start, starts, by_row=True)
    for number in range(1, max_passes + 1):
        _advance(work, tables.chunks, starts, ends, h, rest, slopes, gaps, tol, by_row=False)
        launch(
            close, n * at.blocks, starts, ends, slopes, final, tables.ranges, gaps, info, number, tol,
            S=work.states, D=at.D, K=at.K, BD=at.BD, C=plan.C, LAST=number == max_passes, num_warps=work.joint_warps,
        )  # fmt: skip
    run_rows(work, h, rest, start, final, gaps, tol)
    return info
