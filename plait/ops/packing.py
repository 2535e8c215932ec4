"""Documents packed end to end in one row, and how tokens are cut into chunks.

A `Packing` is tensors, so that a compiled graph holds no document's length. Numbers are read from it where Python runs:
in the bodies of operators and outside of graphs. All that is derived from equal offsets is derived once and shared, so
that the layers of a call, and the thread that loads batches, do it once together. `Chunks` is the one layout in which
the chunked recurrences work, packed or not.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from plait.ops.operator import operator

CHUNK = 64  # tokens in a chunk of a linear recurrence: products of 64 x 64 fill a core's vector units
KEPT = 16  # packings kept: those of a few steps and their parts


@dataclass(frozen=True, eq=False)
class Packing:
    """The n documents of one packed row of t tokens.

    cu_seqlens is on the host, the others are on the call's device: each token's place in its document, from 0; its document;
    the source of each place of `Chunks.split` in chunks of CHUNK, t for padding; where there each token lies. In a compiled
    graph there are as many chunks as t tokens of n documents can need, else as many as they do need, and at least two.
    """

    cu_seqlens: Int[Tensor, " n+1"]
    offsets: Int[Tensor, "1 t"]
    documents: Int[Tensor, " t"]
    index: Int[Tensor, "chunks c"]
    back: Int[Tensor, " t"]
    _chunks: dict[int, "Chunks"] = field(default_factory=dict)

    @classmethod
    def of(cls, cu_seqlens: Int[Tensor, " n+1"], like: Tensor) -> "Packing":
        """The packing that offsets describe, from 0 to the length of `like` (1, t, ...), on the device of `like`. Offsets on a
        device are brought to the host, which waits for it."""
        host = cu_seqlens.to("cpu", torch.int64)
        if torch.compiler.is_compiling():
            return cls(host, *_planned(host, like))
        return known(host, like.device)

    @classmethod
    def of_lengths(cls, lengths: Iterable[int], device: torch.device) -> "Packing":
        return _known((0, *accumulate(lengths)), device)

    @property
    def count(self) -> int:
        """n."""
        return self.cu_seqlens.shape[0] - 1

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        return tuple(end - start for start, end in self.bounds)

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Start and end of each document in the row."""
        cuts = self.cu_seqlens.tolist()
        return tuple(zip(cuts, cuts[1:], strict=False))

    @cached_property
    def counts(self) -> Int[Tensor, " n"]:
        """Tokens of each document, on the device."""
        with torch.inference_mode(False):
            return sent(self.cu_seqlens.diff(), self.offsets.device)

    @cached_property
    def cuts(self) -> Int[Tensor, " n+1"]:
        """`cu_seqlens` as kernels want them."""
        with torch.inference_mode(False):
            return sent(self.cu_seqlens.int(), self.offsets.device)

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
        index = self.counts[:, None] + torch.arange(count, device=rows.device)  # (n, count)
        return rows[torch.arange(len(rows), device=rows.device)[:, None], index]

    def chunks(self, size: int) -> "Chunks":
        if size not in self._chunks:
            with torch.inference_mode(False):  # kept between calls, and gradients may be taken in a later one
                self._chunks[size] = _cut(self.cu_seqlens, size, self.offsets.device)
        return self._chunks[size]


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on the device; the host does not wait for what the device is at."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def known(cu_seqlens: Int[Tensor, " n+1"], device: torch.device) -> Packing:
    """The packing of these offsets, which are on the host: made once, then the same one."""
    return _known(tuple(cu_seqlens.tolist()), device)


@lru_cache(KEPT)
def _known(cuts: tuple[int, ...], device: torch.device) -> Packing:
    with torch.inference_mode(False), torch.device("cpu"):  # planned on the host, whatever the default device is
        cu_seqlens = torch.tensor(cuts)
        lengths = cu_seqlens.diff()
        documents = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        offsets = torch.arange(cuts[-1]) - cu_seqlens[documents]
        layout = _cut(cu_seqlens, CHUNK, device)
        assert layout.index is not None and layout.back is not None
        index = F.pad(layout.index, (0, 0, 0, max(0, 2 - len(layout.index))), value=cuts[-1])
        offsets, documents = sent(offsets[None], device), sent(documents, device)
        packing = Packing(cu_seqlens, offsets, documents, index, layout.back)
        packing._chunks[CHUNK] = layout
        return packing


@operator("packing", cheap=True)
def _planned(cu_seqlens: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`offsets`, `documents`, `index` and `back` of a `Packing`, in shapes that follow those of the arguments alone."""
    packing = known(cu_seqlens, like.device)
    missing = _room(cu_seqlens, like) - len(packing.index)
    index = F.pad(packing.index, (0, 0, 0, missing), value=like.shape[1])
    return packing.offsets.clone(), packing.documents.clone(), index, packing.back.clone()


@torch.library.register_fake("plait::packing")
def _(cu_seqlens, like):
    t = like.shape[1]
    shapes = (1, t), (t,), (_room(cu_seqlens, like), CHUNK), (t,)
    return tuple(like.new_empty(*shape, dtype=torch.int64) for shape in shapes)


def _room(cu_seqlens: Tensor, like: Tensor) -> int:
    """Chunks that t tokens of n documents cannot be more than, and two: torch.compile takes sizes of 0 and 1 for constants."""
    return like.shape[1] // CHUNK + cu_seqlens.shape[0] + 1


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks of `size` tokens in chunk-major order: first the 0th chunk of every sequence, then the 1st, ...

    `alive[c]` sequences have a c-th chunk, of `steps` that the longest has. Packed documents are ordered longest first
    (`order`), so those that are alive are always a prefix, and one step of the recurrence over chunks advances all of them
    together. In a compiled graph `steps` and `length` may be symbols, which no branch here asks for their values.
    """

    size: int
    steps: int
    batch: int
    length: int
    index: Int[Tensor, "n c"] | None = None  # packed: source of each place, one past the end for padding
    back: Int[Tensor, " t"] | None = None  # packed: where each token went
    order: Int[Tensor, " d"] | None = None  # packed: documents, longest first
    lengths: tuple[int, ...] = ()  # packed: of the documents
    counts: tuple[int, ...] = ()  # packed: `alive`

    @property
    def alive(self) -> tuple[int, ...]:
        return self.counts or (self.batch,) * self.steps

    def split(self, x: Float[Tensor, "b t h *k"]) -> Float[Tensor, "n h c *k"]:
        """Tokens into chunks, heads before time; places past a sequence's end are zero."""
        if self.index is not None:
            return gathered(x, self.index)
        x = self._filled(x).unflatten(1, (self.steps, self.size)).transpose(0, 1)  # (steps, b, c, h, *k)
        return x.transpose(2, 3).flatten(0, 1)

    def join(self, y: Float[Tensor, "n h c v"]) -> Float[Tensor, "b t h v"]:
        """The inverse of `split`, padding dropped."""
        if self.back is not None:
            return scattered(y, self.back)
        y = y.unflatten(0, (self.steps, self.batch)).permute(1, 0, 3, 2, 4)  # (b, steps, c, h, v)
        return y.flatten(1, 2)[:, : self.length]

    def by_step(self, x: Float[Tensor, "b t *u"]) -> Float[Tensor, "c n *u"]:
        """Tokens by their place in a chunk, so that one step advances all n chunks; places past an end are zero."""
        if self.index is not None:
            return _padded(x).index_select(0, self.index.T.flatten()).unflatten(0, self.index.T.shape)
        return self._filled(x).unflatten(1, (self.steps, self.size)).transpose(0, 2).flatten(1, 2)

    def from_steps(self, y: Float[Tensor, "c n *u"]) -> Float[Tensor, "b t *u"]:
        """The inverse of `by_step`, padding dropped."""
        if self.back is not None:
            return y.transpose(0, 1).flatten(0, 1).index_select(0, self.back)[None]
        y = y.unflatten(1, (self.steps, self.batch)).transpose(0, 2)
        return y.flatten(1, 2)[:, : self.length]

    def _filled(self, x: Tensor) -> Tensor:
        """(b, t, ...) with zeros to the end of the last chunk."""
        missing = self.steps * self.size - self.length
        if _is_known(missing == 0):  # a pad of nothing copies all the same, and so does its gradient
            return x
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))

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


def _is_known(holds: bool) -> bool:
    """Whether it holds; of symbols of a graph, whether it does for all that they may be."""
    if torch.compiler.is_compiling():  # elsewhere half a second to import
        return torch.fx.experimental.symbolic_shapes.statically_known_true(holds)  # pyright: ignore[reportAttributeAccessIssue]
    return holds


def gathered(x: Float[Tensor, "1 t h *k"], index: Int[Tensor, "n c"]) -> Float[Tensor, "n h c *k"]:
    """Tokens at `index`, 0 where it is t. Head by head, so that what comes out lies as it is wanted: on a CPU a copy of it
    would take as long again."""
    h = x.shape[2]
    place = (index * h)[:, None] + torch.arange(h, device=x.device)[:, None]  # (n, h, c)
    return _padded(x).flatten(0, 1).index_select(0, place.flatten()).unflatten(0, place.shape)


def scattered(y: Float[Tensor, "n h c *k"], back: Int[Tensor, " t"]) -> Float[Tensor, "1 t h *k"]:
    """Each token from its place, the inverse of `gathered`."""
    h, c = y.shape[1:3]
    place = (back + back // c * ((h - 1) * c))[:, None] + torch.arange(0, h * c, c, device=y.device)  # (t, h)
    return y.flatten(0, 2).index_select(0, place.flatten()).unflatten(0, place.shape)[None]


def _padded(x: Float[Tensor, "1 t *u"]) -> Float[Tensor, "t+1 *u"]:
    return F.pad(x[0], (0, 0) * (x.ndim - 2) + (0, 1))


def chunks(batch: int, length: int, size: int, packing: Packing | None) -> Chunks:
    """The chunk layout of a call."""
    if packing is not None:
        return packing.chunks(size)
    return Chunks(size, -(-length // size), batch, length)


def _cut(cu_seqlens: Int[Tensor, " n+1"], size: int, device: torch.device) -> Chunks:
    """The chunks of packed documents; worked out on the host."""
    lengths, total = cu_seqlens.diff(), int(cu_seqlens[-1])
    order = lengths.argsort(descending=True, stable=True)
    counts = (lengths[order] + size - 1) // size  # chunks of each document, longest first
    rank = torch.repeat_interleave(torch.arange(len(order), device="cpu"), counts)  # document by document
    step = torch.arange(len(rank), device="cpu") - (counts.cumsum(0) - counts)[rank]
    by_step = step.argsort(stable=True)
    rank, step = rank[by_step], step[by_step]
    starts = cu_seqlens[order][rank] + step * size  # (n,)
    ramp = torch.arange(size, device="cpu")
    index = starts[:, None] + ramp
    inside = ramp < cu_seqlens[1:][order][rank, None] - starts[:, None]
    places = inside.flatten().nonzero().flatten()
    back = torch.empty(total, dtype=torch.long, device="cpu").index_copy_(0, index.flatten()[places], places)
    index.masked_fill_(~inside, total)
    alive = tuple(step.bincount().tolist())
    index, back, order = (sent(x, device) for x in (index, back, order))
    return Chunks(size, len(alive), 1, total, index, back, order, tuple(lengths.tolist()), alive)


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
