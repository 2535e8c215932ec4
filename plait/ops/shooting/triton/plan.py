"""Which shape of kernel a call takes, how its tensors lie, and the tables of work that kernels read."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from plait.ops.packing import Packing, sent


class Plan(NamedTuple):
    """C: chunks that the joint kernel takes at once. L: steps of a chunk.
    BD: channels of a program. U: steps that loads come ahead, at least. W: steps of burn-in before a chunk."""

    kind: Literal["sequential", "grid"]
    C: int = 1
    L: int = 1
    BD: int = 32
    U: int = 8
    num_warps: int = 1
    W: int = 0


SEQUENTIAL = Plan("sequential")
GRID = Plan("grid", C=32, BD=32, U=8, W=64)

FULL = 2  # warps per multiprocessor from which one channel a thread, one step after the other, keeps the chip busy
SHORT = 256  # steps that are over before a second and a third launch would be
WARPS = 16  # per multiprocessor: what the registers of the chunk kernel let run at once
SHORTEST = 128  # steps of a chunk: twice the burn-in

_force: Plan | None = None


@contextmanager
def forced_plan(plan: Plan | None) -> Iterator[None]:
    """Run every call inside by this plan."""
    global _force
    before, _force = _force, plan
    try:
        yield
    finally:
        _force = before


def plan(rows: int, units: int, longest: int, sms: int) -> Plan:
    """The shape for `rows` sequences of `longest` steps; packed documents count as tokens / longest rows, since short
    ones are no parallel work.

    Sequential (no solver, x read once) costs about 130 cycles of latency a step however many warps run, so it wins as
    soon as there are a few warps of 32 channels per multiprocessor, and for short sequences always. Otherwise the time
    axis must fill the chip: a grid over chunks, as long as they can be with `WARPS` warps on each multiprocessor. It
    reads x once a pass.
    """
    if _force is not None:
        return _force
    blocks = rows * -(-units // SEQUENTIAL.BD)
    if longest <= SHORT or blocks >= FULL * sms:
        return SEQUENTIAL
    chunks = max(1, WARPS * sms // blocks)
    length = max(SHORTEST, -(-longest // chunks))
    return GRID._replace(L=-(-length // GRID.U) * GRID.U)


class Layout(NamedTuple):
    """How channels are cut into blocks. K: channels that lie next to each other in x (all, or those of one head)."""

    D: int
    K: int
    heads: int
    BD: int

    @property
    def blocks(self) -> int:
        return self.heads * -(-self.K // self.BD)

    def constants(self) -> dict[str, int | bool]:
        return {"D": self.D, "K": self.K, "BD": self.BD, "EVEN": self.K % self.BD == 0}


def layout(x: Tensor, BD: int) -> Layout:
    heads, k = x.shape[3:]
    if heads == 1 or x.stride(3) == k:
        return Layout(heads * k, heads * k, 1, BD)
    return Layout(heads * k, k, heads, BD)


Spans = tuple[tuple[int, int, int], ...]  # batch row, first token, tokens


def spans(x: Tensor, packing: Packing | None) -> Spans:
    if packing is None:
        return tuple((row, 0, x.shape[1]) for row in range(x.shape[0]))
    return tuple((0, start, end - start) for start, end in packing.bounds)


@lru_cache(maxsize=64)
def row_table(rows: Spans, device: torch.device) -> Tensor:
    """(n, 4): batch row, first token, tokens, sequence."""
    return _table([(*span, row) for row, span in enumerate(rows)], device)


def _table(numbers: list[tuple[int, ...]], device: torch.device) -> Tensor:
    return sent(torch.tensor(numbers, dtype=torch.int32, device="cpu"), device)


class ChunkTables(NamedTuple):
    chunks: Tensor  # (c, 4): as `row_table`, a chunk each, those of a sequence one after the other
    burn: Tensor  # (c, 4): the steps before each chunk from which its first guess comes; none for a sequence's first
    ranges: Tensor  # (n, 2): a sequence's first chunk, and how many it has


@lru_cache(maxsize=64)
def chunk_tables(rows: Spans, length: int, warm: int, device: torch.device) -> ChunkTables:
    chunks, burn, ranges = [], [], []
    for row, (batch, start, tokens) in enumerate(rows):
        count = -(-tokens // length)
        ranges.append((len(chunks), count))
        for c in range(count):
            at, used = start + c * length, min(length, tokens - c * length)
            before = min(warm, length) if c else 0
            chunks.append((batch, at, used, row))
            burn.append((batch, at - before, before, row))
    return ChunkTables(*(_table(numbers, device) for numbers in (chunks, burn, ranges)))
