"""Packed batches from token shards, to the token: every one once an epoch, and resumed where it stopped.

Documents are cut into pieces of at most `length` tokens. The pieces, in a seeded order, form one endless row of tokens,
and a batch is the next `batch * length` of it; a piece that a batch's end cuts goes on in the next batch, starting
fresh. A target is the next token of the document, also across such cuts, so every token but a document's first is a
target once.

Records with answers (`Shards.scored`) are never cut so: each is one piece, of at most `length` tokens, a batch is `batch`
sequences that whole pieces are put into as far as they fit, and what is no answer is no target.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plait.data.errors import DataError, nearest, whole_number
from plait.data.shards import Shards
from plait.ops.packing import Packing

NO_TARGET = -100
MOST = (1 << 31) - 1  # tokens in a batch, whose offsets are int32
Order = Literal["shuffled", "sequential"]
ORDERS = ("shuffled", "sequential")


Span = tuple[int, int, int]  # tokens of one piece: the first, how many, the end of their document


@dataclass(frozen=True, slots=True)
class Batch:
    """inputs, targets: int64 (1, n); cu_seqlens: int32 (pieces + 1,), from 0 to n, always on the CPU; bytes: UTF-8 bytes of
    the targets; places: int64 (pieces,), where in the corpus each piece begins, on the CPU; None where that is not known.

    A target of -100 is not scored: the position of an end of text, whose next token is another document's.
    """

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    bytes: int
    places: Tensor | None = None

    def part(self, start: int, end: int) -> "Batch":
        """The tokens from `start` to `end`, both of which are bounds of documents."""
        inside = (self.cu_seqlens >= start) & (self.cu_seqlens <= end)
        cuts = self.cu_seqlens[inside] - start
        places = None if self.places is None else self.places[inside[:-1] & (self.cu_seqlens[:-1] < end)]
        return Batch(self.inputs[:, start:end], self.targets[:, start:end], cuts, 0, places)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """On another device, with all that layers will want to know of the documents there."""
        inputs, targets = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.inputs, self.targets))
        Packing.of(self.cu_seqlens, inputs)  # the model finds it again by its offsets
        return Batch(inputs, targets, self.cu_seqlens, self.bytes, self.places)


class Loader:
    """An iterator of `Batch`, endless or for `epochs` epochs; the last batch of the last epoch may be shorter.

    Of `ranks` processes that share each batch, the one with number `rank` gets an equal stretch of its tokens; a piece that
    ends a stretch goes on in the next rank's, starting fresh. Where the loader is says nothing of ranks: another number of
    them goes on from there.
    `order="shuffled"` draws the pieces anew each epoch from (seed, epoch); `"sequential"` keeps the corpus's order, for
    evaluation. Memory: 8 bytes a piece and 24 a document; the tokens stay on disk.
    """

    def __init__(
        self,
        shards: Shards,
        split: str = "train",
        *,
        batch: int,
        length: int,
        seed: int = 0,
        order: Order = "shuffled",
        epochs: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ):
        batch, length = whole_number("batch", batch, 1, MOST), whole_number("length", length, 1, MOST)
        seed = whole_number("seed", seed, 0, (1 << 64) - 1)
        if batch * length > MOST:
            raise DataError(
                f"batch * length = {batch * length}: expected fewer than 2**31 tokens, for int32 cu_seqlens"
            )
        if order not in ORDERS:
            raise DataError(f"order {order!r}: expected shuffled or sequential{nearest(str(order), ORDERS)}")
        epochs = None if epochs is None else whole_number("epochs", epochs, 1)
        if batch % ranks:
            raise DataError(f"batch {batch} over {ranks} ranks: expected a multiple of {ranks}")
        self.rank, self.ranks = rank, ranks
        self.batch, self.length, self.seed, self.order, self.epochs = batch, length, seed, order, epochs
        self.shards, self.split = shards, split
        self._starts, self._ends = shards.documents(split)
        self._scored = shards.scored(scattered=order == "shuffled")
        pieces = (self._ends - self._starts + length - 1) // length
        if self._scored is not None:
            pieces = np.ones_like(pieces)
        self._first_piece = np.concatenate(([0], np.cumsum(pieces)))
        self._tokens = shards.tokens(scattered=order == "shuffled")
        self._token_bytes = shards.token_bytes()
        self._epoch, self._position, self._offset = 0, 0, 0  # the next token: piece in this epoch's order, place in it
        self._permutation: tuple[int, NDArray[np.int64]] | None = None

    @property
    def tokens(self) -> int:
        """Tokens in one epoch, ends of text included."""
        return int((self._ends - self._starts).sum())

    @property
    def pieces(self) -> int:
        return int(self._first_piece[-1])

    @property
    def epoch(self) -> int:
        return self._epoch

    def pieces_of(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(starts, lengths) in tokens of an epoch's pieces, in the order in which they are read."""
        documents = np.repeat(np.arange(len(self._starts)), np.diff(self._first_piece))
        starts = self._starts[documents] + (np.arange(self.pieces) - self._first_piece[documents]) * self.length
        lengths = np.minimum(self._ends[documents] - starts, self.length)
        order = np.arange(self.pieces) if self.order == "sequential" else self._order(epoch)
        return starts[order], lengths[order]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        spans, place = self._own_spans() if self._scored is None else self._own_sequences()
        cuts = [0, *accumulate(taken for _, taken, _ in spans)]
        inputs = np.empty(cuts[-1], dtype=np.int64)
        targets = np.empty(cuts[-1], dtype=np.int64)
        for filled, (start, taken, document_end) in zip(cuts, spans, strict=False):
            following = self._tokens[start : start + taken + 1]
            inputs[filled : filled + taken] = following[:taken]
            if start + taken < document_end:
                targets[filled : filled + taken] = following[1:]
            else:
                targets[filled : filled + taken - 1] = following[1:taken]
                targets[filled + taken - 1] = NO_TARGET
            if self._scored is not None:
                here = targets[filled : filled + taken]
                learned = self._scored[start + 1 : start + taken + 1]
                here[: len(learned)][learned == 0] = NO_TARGET
        # Only now, so that an interrupt above leaves the loader where the last whole batch left it.
        self._epoch, self._position, self._offset = place
        return Batch(
            inputs=torch.from_numpy(inputs[None]),
            targets=torch.from_numpy(targets[None]),
            cu_seqlens=torch.tensor(cuts, dtype=torch.int32, device="cpu"),
            bytes=int(self._token_bytes[targets[targets != NO_TARGET]].sum()),
            places=torch.tensor([start for start, _, _ in spans], device="cpu"),
        )

    def _own_spans(self) -> tuple[list[Span], tuple[int, int, int]]:
        """This rank's stretch of the next batch, and the place after the whole of it."""
        spans, place = self._spans(self.batch * self.length)
        size = sum(taken for _, taken, _ in spans)
        if size < self.ranks:  # nothing, or the last few tokens of all
            raise StopIteration
        return list(_within(spans, size * self.rank // self.ranks, size * (self.rank + 1) // self.ranks)), place

    def _own_sequences(self) -> tuple[list[Span], tuple[int, int, int]]:
        """The whole records in this rank's sequences of the next batch, and the place after all of them."""
        sequences, place = self._sequences()
        if len(sequences) < self.ranks:
            raise StopIteration
        first, last = (len(sequences) * rank // self.ranks for rank in (self.rank, self.rank + 1))
        return [span for sequence in sequences[first:last] for span in sequence], place

    def _sequences(self) -> tuple[list[list[Span]], tuple[int, int, int]]:
        """Records in order, put into `batch` sequences of at most `length` tokens each; fewer at the end of the last epoch."""
        sequences, room = list[list[Span]](), 0
        epoch, position = self._epoch, self._position
        while True:
            if position == self.pieces:
                if self.epochs is not None and epoch + 1 >= self.epochs:
                    break
                epoch, position = epoch + 1, 0
            start, end, document_end = self._piece(epoch, position)
            if end - start > room:
                if len(sequences) == self.batch:
                    break
                sequences.append([])
                room = self.length
            sequences[-1].append((start, end - start, document_end))
            room -= end - start
            position += 1
        return sequences, (epoch, position, 0)

    def _spans(self, size: int) -> tuple[list[Span], tuple[int, int, int]]:
        """What the next `size` tokens are, fewer at the end of the last epoch, and the place after them."""
        spans, filled = list[Span](), 0
        epoch, position, offset = self._epoch, self._position, self._offset
        while filled < size:
            if position == self.pieces:
                if self.epochs is not None and epoch + 1 >= self.epochs:
                    break
                epoch, position = epoch + 1, 0
            start, end, document_end = self._piece(epoch, position)
            start += offset
            taken = min(end - start, size - filled)
            spans.append((start, taken, document_end))
            filled += taken
            position, offset = (position + 1, 0) if start + taken == end else (position, offset + taken)
        return spans, (epoch, position, offset)

    def state_dict(self) -> dict[str, Any]:
        """Plain data: where the next batch begins, and of what. A resumed run may change `batch` and `epochs` only."""
        return {"epoch": self._epoch, "position": self._position, "offset": self._offset, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; raises DataError if it is another corpus's, split's, length's, seed's or order's."""
        place = ("epoch", "position", "offset")
        missing = [name for name in (*place, *self._identity()) if name not in state]
        if missing:
            raise DataError(f"loader state without {missing[0]!r}: expected what state_dict() returned")
        for name, ours in self._identity().items():
            if state[name] != ours:
                raise DataError(f"loader state of {name} {state[name]!r}, but this loader's {name} is {ours!r}")
        epoch, position, offset = (state[name] for name in place)
        if epoch < 0 or not 0 <= position <= self.pieces or not 0 <= offset < self.length:
            raise DataError(f"loader state at piece {position}, token {offset}: this corpus has {self.pieces} pieces")
        self._epoch, self._position, self._offset = epoch, position, offset

    def _identity(self) -> dict[str, Any]:
        return {
            "shards": self.shards.key,
            "split": self.split,
            "length": self.length,
            "seed": self.seed,
            "order": self.order,
        }

    def _piece(self, epoch: int, position: int) -> tuple[int, int, int]:
        """(start, end, end of its document) in tokens of the piece at `position` in the epoch's order."""
        piece = position if self.order == "sequential" else int(self._order(epoch)[position])
        document = int(np.searchsorted(self._first_piece, piece, side="right")) - 1
        document_end = int(self._ends[document])
        start = int(self._starts[document]) + (piece - int(self._first_piece[document])) * self.length
        return start, min(start + self.length, document_end), document_end

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._permutation is None or self._permutation[0] != epoch:
            # Sorting a bit generator's raw words: unlike Generator.permutation, numpy promises these never change.
            words = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(self.pieces)
            self._permutation = epoch, np.argsort(words, kind="stable")
        return self._permutation[1]


def _within(spans: list[Span], first: int, last: int) -> Iterator[Span]:
    """The part of `spans` between the `first` and the `last` of their tokens."""
    at = 0
    for start, taken, document_end in spans:
        skipped, end = max(0, first - at), min(taken, last - at)
        if skipped < end:
            yield start + skipped, end - skipped, document_end
        at += taken
