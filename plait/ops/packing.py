"""Documents packed end to end in one row, and how tokens are cut into chunks.

A `Packing` holds the documents' lengths on the host, so no op has to ask the device, and what ops derive from them
is derived once per call. `Chunks` is the one layout in which the chunked recurrences work, packed or not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(eq=False)
class Packing:
    """The documents of one packed row: their lengths, and tensors derived from them on `device`."""

    lengths: tuple[int, ...]
    device: torch.device
    _chunks: dict[int, "Chunks"] = field(default_factory=dict)

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Start and end of each document in the row."""
        ends = tuple(accumulate(self.lengths))
        return tuple(zip((0, *ends[:-1]), ends, strict=True))

    @cached_property
    def offsets(self) -> Int[Tensor, "1 t"]:
        """Each token's place inside its document, from 0."""
        with torch.inference_mode(False):  # kept between calls, and gradients may be taken in a later one
            return torch.cat([torch.arange(n, device=self.device) for n in self.lengths])[None]

    @cached_property
    def documents(self) -> Int[Tensor, " t"]:
        """Each token's document."""
        with torch.inference_mode(False):
            lengths = torch.tensor(self.lengths, device=self.device)
            return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.device), lengths)

    @cached_property
    def place(self) -> Int[Tensor, " t"]:
        """Where each token lies in `to_rows`, rows and time flattened."""
        with torch.inference_mode(False):
            return self.documents * max(self.lengths) + self.offsets[0]

    def to_rows(self, x: Float[Tensor, "1 t *d"]) -> Float[Tensor, "n longest *d"]:
        """Documents as the rows of a batch, zeros after their ends."""
        rows = x.new_zeros(len(self.lengths) * max(self.lengths), *x.shape[2:])
        return rows.index_copy(0, self.place, x[0]).unflatten(0, (len(self.lengths), -1))

    def from_rows(self, rows: Float[Tensor, "n longest *d"]) -> Float[Tensor, "1 t *d"]:
        """The inverse of `to_rows`."""
        return rows.flatten(0, 1)[self.place][None]

    def last(self, rows: Float[Tensor, "n past+longest *d"], count: int) -> Float[Tensor, "n count *d"]:
        """The last `count` of each row when `count` earlier entries stand before the document's own."""
        ends = torch.tensor(self.lengths, device=self.device)
        index = ends[:, None] + torch.arange(count, device=self.device)  # (n, count)
        return rows[torch.arange(len(rows), device=self.device)[:, None], index]

    def chunks(self, size: int) -> "Chunks":
        if size not in self._chunks:
            with (
                torch.inference_mode(False),
                torch.device("cpu"),
            ):  # planned on the host, whatever the default device is
                self._chunks[size] = _packed_chunks(self, size)
        return self._chunks[size]


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks of `size` tokens in chunk-major order: first the 0th chunk of every sequence, then the 1st, ...

    `alive[c]` sequences have a c-th chunk. Packed documents are ordered longest first (`order`), so those that are
    alive are always a prefix, and one step of the recurrence over chunks advances all of them together.
    """

    size: int
    alive: tuple[int, ...]
    batch: int
    length: int
    index: Int[Tensor, "n c"] | None = None  # packed: source of each place, one past the end for padding
    back: Int[Tensor, " t"] | None = None  # packed: where each token went
    order: Int[Tensor, " d"] | None = None  # packed: documents, longest first
    lengths: tuple[int, ...] = ()  # packed: of the documents

    def split(self, x: Float[Tensor, "b t h *k"]) -> Float[Tensor, "n h c *k"]:
        """Tokens into chunks, heads before time; places past a sequence's end are zero."""
        if self.index is not None:
            padded = F.pad(x[0], (0, 0) * (x.ndim - 2) + (0, 1))
            return padded[self.index].transpose(1, 2)  # (n, h, c, *k)
        steps = len(self.alive)
        missing = steps * self.size - self.length
        if missing:  # a pad of nothing copies all the same, and so does its gradient
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
        x = x.unflatten(1, (steps, self.size)).transpose(0, 1)  # (steps, b, c, h, *k)
        return x.transpose(2, 3).flatten(0, 1)

    def join(self, y: Float[Tensor, "n h c v"]) -> Float[Tensor, "b t h v"]:
        """The inverse of `split`, padding dropped."""
        if self.back is not None:
            return y.transpose(1, 2).flatten(0, 1)[self.back][None]
        y = y.unflatten(0, (len(self.alive), self.batch)).permute(1, 0, 3, 2, 4)  # (b, steps, c, h, v)
        y = y.flatten(1, 2)
        return y if y.shape[1] == self.length else y[:, : self.length]

    def by_step(self, x: Float[Tensor, "b t *u"]) -> Float[Tensor, "c n *u"]:
        """Tokens by their place in a chunk, so that one step advances all n chunks; places past an end are zero."""
        if self.index is not None:
            return F.pad(x[0], (0, 0) * (x.ndim - 2) + (0, 1))[
                self.index.T.contiguous()
            ]  # or the result lies as the index does
        steps = len(self.alive)
        missing = steps * self.size - self.length
        if missing:  # a pad of nothing copies all the same
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
        return x.unflatten(1, (steps, self.size)).transpose(0, 2).flatten(1, 2)

    def from_steps(self, y: Float[Tensor, "c n *u"]) -> Float[Tensor, "b t *u"]:
        """The inverse of `by_step`, padding dropped."""
        if self.back is not None:
            return y.transpose(0, 1).flatten(0, 1)[self.back][None]
        y = y.unflatten(1, (len(self.alive), self.batch)).transpose(0, 2)
        return y.flatten(1, 2)[:, : self.length]

    @cached_property
    def last(self) -> tuple[list[int], list[int]]:
        """Where each sequence (in advancing order) ends: its place in a chunk, and the chunk."""
        groups = [0, *accumulate(self.alive)]
        lengths = sorted(self.lengths, reverse=True) if self.lengths else [self.length] * self.batch
        ends = [(n - 1) // self.size for n in lengths]
        return [(n - 1) % self.size for n in lengths], [groups[j] + row for row, j in enumerate(ends)]

    def sort(self, state: Tensor) -> Tensor:
        """A state per sequence, in the order in which the chunks advance."""
        return state if self.order is None else state[self.order]

    def unsort(self, state: Tensor) -> Tensor:
        return state if self.order is None else state[torch.argsort(self.order)]


def chunks(batch: int, length: int, size: int, packing: Packing | None) -> Chunks:
    """The chunk layout of a call."""
    if packing is not None:
        return packing.chunks(size)
    return Chunks(size, (batch,) * -(-length // size), batch, length)


def _packed_chunks(packing: Packing, size: int) -> Chunks:
    lengths, total = packing.lengths, sum(packing.lengths)
    order = sorted(range(len(lengths)), key=lambda d: -lengths[d])
    places, alive = [], []
    for c in range(-(-max(lengths) // size)):
        step = [d for d in order if lengths[d] > c * size]
        alive.append(len(step))
        for d in step:
            start, end = packing.bounds[d][0] + c * size, packing.bounds[d][1]
            used = min(size, end - start)
            places.append((start, used))
    starts = torch.tensor([start for start, _ in places])
    used = torch.tensor([count for _, count in places])
    ramp = torch.arange(size)
    inside = ramp < used[:, None]
    index = torch.where(inside, starts[:, None] + ramp, total)  # (n, c)
    back = torch.empty(total, dtype=torch.long)
    back[index[inside]] = torch.arange(index.numel()).view_as(index)[inside]
    to = packing.device
    return Chunks(size, tuple(alive), 1, total, index.to(to), back.to(to), torch.tensor(order).to(to), lengths)


def each_document(
    run: Callable[..., tuple[Tensor, Tensor | None]], tensors: Sequence[Tensor], state: Tensor | None, packing: Packing
) -> tuple[Tensor, Tensor | None]:
    """Run a dense op on every document alone: what packing must equal, and what references do."""
    outputs, states = [], []
    for row, (start, end) in enumerate(packing.bounds):
        document = [x[:, start:end] for x in tensors]
        y, final = run(*document, state=None if state is None else state[row : row + 1])
        outputs.append(y)
        states.append(final)
    return torch.cat(outputs, 1), None if state is None else torch.cat(states)
