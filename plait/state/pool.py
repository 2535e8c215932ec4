"""States of many sequences in tensors of fixed shapes, allocated once and written in place: what serving runs on.

A row is the place of one sequence. What a layer keeps of all tokens lies in pages of `page` tokens, and a table says which
pages are a row's, in order; everything else has one place per row. Lengths and the table are on the device, so that a step is
a function of device tensors alone; the host keeps the same numbers for itself and never asks.

`snapshot` copies what cannot be cut and shares the pages; one is copied before somebody writes where another sees a token.
"""

import heapq
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from plait.design.spec import Leaf, Memories, Memory
from plait.state.model_state import ModelState, remember
from plait.state.values import Branches, State


class PoolFull(RuntimeError):
    """There is no row, or no page, for what was asked. The pool is as it was before."""


@dataclass(frozen=True, eq=False)
class Pages(State):
    """What is kept of all tokens, (pages, page, ...) each, by leaf."""

    leaves: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return self.leaves


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a row remembered after `length` tokens. Its pages stay in the pool for as long as it lives."""

    length: int
    design: str
    values: dict[str, Tensor]
    pages: tuple[int, ...]
    since: tuple[int, int]
    pool: "weakref.ref[Pool]"


@dataclass(frozen=True, eq=False)
class PoolRows:
    """Rows of a pool, given to a model where a state is: `model(tokens, pool.at([0, 3]))`. Row i of the call is the i-th."""

    pool: "Pool"
    rows: tuple[int, ...]
    index: slice | Int[Tensor, " b"]

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.pool.lengths[row] for row in self.rows)

    @property
    def straight(self) -> bool:
        """Whether the rows are neighbours, and the one page of each has its number: then nobody need look into the table."""
        alone = isinstance(self.index, slice) and self.pool.width == 1
        return alone and all(self.pool.tables[row] in ([], [row]) for row in self.rows)


class Pool:
    """Room for `rows` sequences of up to `tokens` tokens each, in `pages` pages of `page` tokens (a page per row: None). Rings
    of windows have places for `drafts` tokens that are taken back again.

    lengths: tokens in each row, on the host, the model's `meta` tokens among them. starts (rows + 1,), table (rows + 1, pages
    of a row): the same on the device.
    The last row and the last page are nobody's: where steps of a fixed size put what they must not keep.
    """

    def __init__(
        self,
        memory: Memories,
        design: str,
        device: torch.device,
        *,
        rows: int,
        tokens: int,
        page: int | None = None,
        pages: int | None = None,
        drafts: int = 0,
        meta: int = 0,
    ):
        self.drafts, self.meta = drafts, meta
        self.memory, self.design, self.device = memory, design, device
        self.rows, self.tokens, self.page = rows, tokens, page or tokens
        self.width = -(-tokens // self.page)  # pages of a row
        self.pages = pages or rows * self.width
        self.leaves = dict(_leaves(memory))
        with torch.inference_mode(False):
            self.starts = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self._allocate()
        self.keeps_all = any(leaf.keep == "all" for leaf in self.leaves.values())
        self.lengths = [0] * rows
        self._joined, self._reached = (
            [0] * rows,
            [0] * rows,
        )  # tokens that a value brought, and the most there were since
        self.tables: list[list[int]] = [[] for _ in range(rows)]
        self.users: list[set[int]] = [
            set() for _ in range(self.pages)
        ]  # of each page: rows, and snapshots by negative numbers
        self._kept: dict[int, int] = {}  # the length of each living snapshot
        self._taken = 0
        self._free_rows, self._free_pages = list(range(rows)), set(range(self.pages))
        self._snapshots: list[list[weakref.ref[Snapshot]]] = [[] for _ in range(rows)]

    def _allocate(self) -> None:
        with torch.inference_mode(False):
            self.slots: tuple[State, ...] = tuple(_room(part, self._make) for part in self.memory.parts)
            self.table = torch.full((self.rows + 1, self.width), self.pages, dtype=torch.int32, device=self.device)
        self.tensors = Branches(self.slots).tensors()

    def _make(self, leaf: Leaf) -> Tensor:
        dtype = getattr(torch, leaf.dtype)
        if leaf.keep == "all":
            return torch.zeros(self.pages + 1, self.page, *leaf.shape, dtype=dtype, device=self.device)
        kept = () if isinstance(leaf.keep, str) else (leaf.prefix + leaf.keep + max(1, self.drafts) * leaf.ring,)
        tensor = torch.zeros(self.rows + 1, *kept, *leaf.shape, dtype=dtype, device=self.device)
        for i, value in enumerate(leaf.start):
            tensor[:, i] = value
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.tensors.values(), self.starts, self.table))

    @property
    def free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def free_pages(self) -> int:
        return len(self._free_pages)

    def at(self, rows: Sequence[int] | Tensor) -> PoolRows:
        """These rows as a call takes them. Raises ValueError for a row that holds no sequence, or one given twice."""
        rows = self._checked(rows)
        if rows and rows == tuple(range(rows[0], rows[0] + len(rows))):
            return PoolRows(self, rows, slice(rows[0], rows[0] + len(rows)))
        return PoolRows(self, rows, self.on_device(rows))

    def on_device(self, numbers: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers of the host as a tensor, without waiting for the device."""
        if self.device.type != "cuda":
            return torch.tensor(numbers, dtype=dtype, device=self.device)
        return torch.tensor(numbers, dtype=dtype, device="cpu").pin_memory().to(self.device, non_blocking=True)

    def join(self, state: ModelState | Snapshot) -> list[int]:
        """Take in every row of a state, or what a snapshot holds (whose pages are then shared); gives the rows' places.
        Raises PoolFull, and ValueError for a state of another design and a snapshot of another pool."""
        self._check_design(state.design)
        if isinstance(state, Snapshot):
            self._check_pool(state)
        lengths = [state.length] if isinstance(state, Snapshot) else state.lengths
        if len(lengths) > len(self._free_rows):
            self._full(f"{len(lengths)} rows", rows=self.rows + len(lengths) - len(self._free_rows))
        if isinstance(state, Snapshot):
            row = heapq.heappop(self._free_rows)
            self._put_back(row, state)
            return [row]
        self._check_room(lengths, sum(self._pages_for(n) for n in lengths))
        tensors = state.tensors()  # raises where keys are stale
        rows = [heapq.heappop(self._free_rows) for _ in lengths]
        for row, length in zip(rows, lengths, strict=True):
            self.tables[row] = [self._take_page(row) for _ in range(self._pages_for(length))]
            self.lengths[row] = self._joined[row] = self._reached[row] = length
        self._tell(rows)
        for name, x in tensors.items():
            self._write(name, rows, x.detach(), lengths)
        return rows

    def leave(self, rows: Sequence[int] | Tensor) -> None:
        """Rows that are done; their places and pages are free again. Raises as `at` does, before anything has changed."""
        rows = self._checked(rows)
        for row in rows:
            self._drop_pages(row)
            self.lengths[row] = 0
            self._snapshots[row] = []
            heapq.heappush(self._free_rows, row)
        self._tell(rows)

    def reserve(self, rows: Sequence[int], count: int) -> None:
        """Room for `count` more tokens in each of these rows: pages, and copies of shared ones that would be written to.
        Raises PoolFull before anything has changed, and ValueError for a row that has left since `at` gave it."""
        if not set(self._free_rows).isdisjoint(rows):  # asked at every step
            self._numbers(rows)
        if not self.keeps_all:
            return
        missing = [self._pages_for(self.lengths[row] + count) - len(self.tables[row]) for row in rows]
        shared: list[int] = []
        for i, row in enumerate(rows):
            if self._would_overwrite(row, set(rows[:i]) - set(shared)):
                shared.append(row)
        if not shared and not any(extra > 0 for extra in missing):
            return
        self._check_room([self.lengths[row] + count for row in rows], sum(max(0, n) for n in missing) + len(shared))
        for row in shared:
            self._copy_last(row)
        for row, extra in zip(rows, missing, strict=True):
            self.tables[row] += [self._take_page(row) for _ in range(extra)]
        self._tell_tables()

    def advance(self, rows: Sequence[int], count: int) -> None:
        """What the host knows of `count` tokens that a call has added; the device has counted by itself."""
        for row in rows:
            self.lengths[row] += count
            self._reached[row] = max(self._reached[row], self.lengths[row])

    def snapshot(self, row: int) -> Snapshot:
        """What the row remembers now, to go back to or to start others from."""
        row = self._checked_row(row)
        values = {name: x[row].clone() for name, x in self.tensors.items() if self.leaves[name].keep != "all"}
        length, self._taken = self.lengths[row], self._taken + 1
        pages = tuple(self.tables[row][: self._pages_for(length)])
        since = self._joined[row], self._reached[row]
        taken = Snapshot(length, self.design, values, pages, since, weakref.ref(self))
        for page in pages:
            self.users[page].add(-self._taken)
        self._kept[-self._taken] = length
        weakref.finalize(taken, _released, weakref.ref(self), -self._taken, pages)
        self._snapshots[row].append(weakref.ref(taken))
        return taken

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """The row goes on from what the snapshot holds, as if it had never gone further."""
        row = self._checked_row(row)
        self._check_design(snapshot.design)
        self._check_pool(snapshot)
        before = [ref for ref in self._snapshots[row] if (s := ref()) is not None and s.length <= snapshot.length]
        known = any(ref() is snapshot for ref in before)
        self._drop_pages(row)
        self._put_back(row, snapshot)
        self._snapshots[row] = before if known else [weakref.ref(snapshot)]

    def truncate(self, row: int, length: int) -> None:
        """Forget all but the row's first `length` tokens. Windows can give back the last `drafts` that they have read, or
        one. Where a layer keeps more than keys, only to where a living snapshot of the row was taken; else ValueError names the
        nearest one."""
        row, length = self._checked_row(row), index(length)
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"row {row} has {self.lengths[row]} tokens and cannot be cut to {length}")
        if 0 < length < self.meta:
            raise ValueError(f"row {row} begins with {self.meta} meta tokens and cannot be cut to {length} tokens")
        if length == self.lengths[row]:
            return
        living = [taken for ref in self._snapshots[row] if (taken := ref()) is not None]
        lost = self._lacks(row, length)
        if lost is not None:
            match = next((taken for taken in living if taken.length == length), None)
            if match is None:
                raise ValueError(self._no_way_back(row, length, lost, [taken.length for taken in living]))
            self.restore(row, match)
            return
        for page in self.tables[row][self._pages_for(length) :]:
            self._drop_page(page, row)
        del self.tables[row][self._pages_for(length) :]
        self.lengths[row] = length
        self._snapshots[row] = [weakref.ref(taken) for taken in living if taken.length <= length]
        self._tell([row])

    def _lacks(self, row: int, length: int) -> str | None:
        """A leaf of which the pool no longer has all that it would hold after `length` tokens."""
        for name, leaf in self.leaves.items():
            if leaf.keep == "all":
                continue
            if not isinstance(leaf.keep, int) or not leaf.ring:
                return name
            size = self.tensors[name].shape[1] - leaf.prefix
            there = max(
                leaf.prefix, self._joined[row] - leaf.keep, self._reached[row] - size
            )  # the first token in the ring
            if max(leaf.prefix, length - leaf.keep) < min(there, length):
                return name
        return None

    def take(self, rows: Sequence[int] | Tensor) -> ModelState:
        """A copy of rows as a value; a row may be taken more than once."""
        taken = self._numbers(rows)
        if not taken:
            raise ValueError("take needs at least one row")
        lengths = tuple(self.lengths[row] for row in taken)
        names = iter(self.leaves)  # in the order in which `remember` asks for them
        made = tuple(remember(part, lengths, lambda leaf: self._read(next(names), taken)) for part in self.memory.parts)
        return ModelState.of(made, lengths, self.design, self.device)

    def grow(self, tokens: int) -> None:
        """Room for sequences of up to `tokens` tokens: longer pages where a row has one, else more of them. Everything lies in
        new tensors then, and for a moment in both."""
        if tokens <= self.tokens:
            return
        old, page, pages = self.tensors, self.page, self.pages
        self.tokens = tokens
        if self.width == 1:
            self.page = tokens
        else:
            self.width = -(-tokens // self.page)
            self.pages = max(self.pages, self.rows * self.width)
            self.users += [set() for _ in range(self.pages - pages)]
            self._free_pages |= set(range(pages, self.pages))
        self._allocate()
        for name, x in old.items():
            if self.leaves[name].keep == "all":
                self.tensors[name][:pages, :page] = x[:pages]
            else:
                self.tensors[name].copy_(x)
        self._tell_tables()

    def _write(self, name: str, rows: list[int], x: Tensor, lengths: Sequence[int]) -> None:
        leaf, room = self.leaves[name], self.tensors[name]
        if leaf.keep != "all" and not leaf.ring:
            room[torch.tensor(rows, device=self.device)] = x.to(room.dtype)
            return
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for here, first, end in _runs(leaf, x.shape[1], length):
                flat, places = self._places(name, row, first, end)
                flat[places] = x[i, here : here + end - first].to(room.dtype)

    def _read(self, name: str, rows: Sequence[int]) -> Tensor:
        """What the leaf holds of these rows, as a value has it."""
        leaf, room = self.leaves[name], self.tensors[name]
        if leaf.keep != "all" and not leaf.ring:
            return room[torch.tensor(rows, device=self.device)]
        lengths = [self.lengths[row] for row in rows]
        out = room.new_zeros(leaf.sized(len(rows), max(lengths)).shape)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for here, first, end in _runs(leaf, out.shape[1], length):
                flat, places = self._places(name, row, first, end)
                out[i, here : here + end - first] = flat[places]
        return out

    def _places(self, name: str, row: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Where the tokens `first` to `end` of a row lie in a leaf, its first two axes taken as one."""
        leaf, room = self.leaves[name], self.tensors[name]
        at = torch.arange(first, end, device="cpu")
        if leaf.keep == "all":
            pages = torch.tensor(self.tables[row] or [self.pages], device="cpu")
            places = pages[at // self.page] * self.page + at % self.page
        else:
            at = torch.where(at < leaf.prefix, at, leaf.prefix + (at - leaf.prefix) % (room.shape[1] - leaf.prefix))
            places = row * room.shape[1] + at
        return room.flatten(0, 1), places.to(self.device)

    def _put_back(self, row: int, snapshot: Snapshot) -> None:
        for name, x in snapshot.values.items():
            self.tensors[name][row] = x
        for page in snapshot.pages:
            self.users[page].add(row)
        self.tables[row], self.lengths[row] = list(snapshot.pages), snapshot.length
        self._joined[row], self._reached[row] = snapshot.since
        self._tell([row])

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page) if self.keeps_all else 0

    def _take_page(self, row: int) -> int:
        page = row if self.width == 1 and row in self._free_pages else min(self._free_pages)
        self._free_pages.remove(page)
        self.users[page].add(row)
        return page

    def _drop_page(self, page: int, user: int) -> None:
        self.users[page].discard(user)
        if not self.users[page]:
            self._free_pages.add(page)

    def _drop_pages(self, row: int) -> None:
        for page in self.tables[row]:
            self._drop_page(page, row)
        self.tables[row] = []

    def _would_overwrite(self, row: int, writers: set[int]) -> bool:
        """Whether the row's next token falls where somebody else sees a token of his own, or one of the `writers` puts one."""
        length, table = self.lengths[row], self.tables[row]
        inside = length // self.page
        if inside >= len(table) or len(self.users[table[inside]]) == 1:
            return False
        others = self.users[table[inside]] - {row}
        return bool(others & writers) or any(
            (self.lengths[user] if user >= 0 else self._kept[user]) > length for user in others
        )

    def _copy_last(self, row: int) -> None:
        inside = self.lengths[row] // self.page
        shared, own = self.tables[row][inside], self._take_page(row)
        for name, x in self.tensors.items():
            if self.leaves[name].keep == "all":
                x[own] = x[shared]
        self._drop_page(shared, row)
        self.tables[row][inside] = own

    def _tell(self, rows: Sequence[int]) -> None:
        """The device, what has changed on the host."""
        rows = list(rows)
        self.starts[self.on_device(rows)] = self.on_device([self.lengths[row] for row in rows])
        self._tell_tables()

    def _tell_tables(self) -> None:
        if self.keeps_all:
            full = [[*table, *[self.pages] * (self.width - len(table))] for table in (*self.tables, [])]
            self.table.copy_(self.on_device(full, torch.int32))

    def _checked(self, rows: Any) -> tuple[int, ...]:
        rows = self._numbers(rows)
        if len(set(rows)) < len(rows):
            raise ValueError(f"rows {list(rows)}: a row can be given once in a call")
        return rows

    def _numbers(self, rows: Any) -> tuple[int, ...]:
        if not isinstance(rows, Iterable):
            raise ValueError(f"rows of a pool are given as a sequence, such as [0]; got {rows!r}")
        return tuple(self._checked_row(row) for row in rows)

    def _checked_row(self, row: Any) -> int:
        """As an int, whatever kind of integer it came in: rows are told apart by their numbers."""
        number = index(row) if hasattr(row, "__index__") and not isinstance(row, bool) else -1
        if not 0 <= number < self.rows or number in self._free_rows:
            taken = sorted(set(range(self.rows)) - set(self._free_rows))
            raise ValueError(f"row {row} of the pool holds no sequence; those that do: {taken}")
        return number

    def _check_design(self, design: str) -> None:
        if design != self.design:
            raise ValueError(f"this is the state of another design ({design}) than the pool's ({self.design})")

    def _check_pool(self, snapshot: Snapshot) -> None:
        if snapshot.pool() is not self:  # its pages are there
            raise ValueError(
                "this snapshot is of another pool; there, pool.take([row]) gives a value that any pool can join"
            )

    def _check_room(self, lengths: Sequence[int], pages: int) -> None:
        if self.keeps_all and max(lengths) > self.width * self.page:
            self._full(f"a sequence of {max(lengths)} tokens", tokens=max(lengths))
        if pages > len(self._free_pages):
            self._full(f"{pages} more pages", pages=self.pages + pages - len(self._free_pages))

    def _full(self, what: str, *, rows: int = 0, tokens: int = 0, pages: int = 0) -> None:
        rows, tokens = rows or self.rows, tokens or self.tokens
        pages = max(
            pages or self.pages, rows * -(-tokens // self.page) if rows > self.rows or tokens > self.tokens else 0
        )
        spec = self.memory.sized(rows, 0).nbytes + self.memory.sized(1, pages * self.page).nbytes
        raise PoolFull(
            f"no room for {what}: the pool has {self.rows} rows ({self.free_rows} free) of up to {self.tokens} tokens and "
            f"{self.pages} pages of {self.page} ({self.free_pages} free); rows={rows}, tokens={tokens}, pages={pages} would do "
            f"(about {spec:,} bytes)"
        )

    def _no_way_back(self, row: int, length: int, lost: str, known: list[int]) -> str:
        slot, window = lost.split(".")[0], self.leaves[lost].ring
        nearest = min(known, key=lambda n: abs(n - length), default=None)
        where = f"the nearest was taken at {nearest}" if nearest is not None else "it has none"
        return (
            f"row {row} cannot be cut to {length} tokens: what slot {slot} remembers "
            + (f"goes back by {self.drafts} drafts alone" if window else "can only be restored")
            + f", and no living snapshot of the row was taken there ({where}); take one with pool.snapshot({row}) in time"
            + (", or make the pool with more drafts" if window else "")
        )


def _released(pool: "weakref.ref[Pool]", number: int, pages: tuple[int, ...]) -> None:
    """A snapshot is gone."""
    here = pool()
    if here is not None:
        del here._kept[number]
        for page in pages:
            here._drop_page(page, number)


def _runs(leaf: Leaf, size: int, length: int) -> list[tuple[int, int, int]]:
    """Which tokens of a row the `size` places of a value hold: from where in it on, the first, and the end."""
    if not isinstance(leaf.keep, int):
        return [(0, 0, length)]
    kept = min(length, leaf.keep)
    return [(0, 0, min(length, leaf.prefix)), (size - kept, length - kept, length)]


def _leaves(memory: Memory | Memories, prefix: str = "") -> list[tuple[str, Leaf]]:
    """Every leaf by name, as the tensors of states are called."""
    if isinstance(memory, Memory):
        return [(prefix + leaf.name, leaf) for leaf in memory.leaves]
    return [pair for i, part in enumerate(memory.parts) for pair in _leaves(part, f"{prefix}{i}.")]


def _room(memory: Memory | Memories, make: Any) -> State:
    """Like `remember`, for a pool: what is kept of all tokens lies in pages."""
    if isinstance(memory, Memories):
        return Branches(tuple(_room(part, make) for part in memory.parts))
    tensors = {leaf.name: make(leaf) for leaf in memory.leaves}
    paged = any(leaf.keep == "all" for leaf in memory.leaves)
    return Pages(tensors) if paged else State.kinds[memory.kind].of(tensors, ())
