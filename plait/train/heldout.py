"""How well a model does on text that it was not trained on, by what it is trained on: one way, in training and in `plait eval`.

A document is cut into pieces of at most `length` tokens, and each piece is read from an empty state. Every token but a
document's first is predicted once, the first of a later piece by the last of the piece before; the end of text is one of
them. So the number depends on the text, the model and `length`, and not on how many pieces are computed together.
Of records with answers, which are shorter than that, only the answers are scored.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from plait.data import Batch, Shards
from plait.data.loader import NO_TARGET
from plait.layers import Channels
from plait.model import NextToken, Objective
from plait.train.solver import SolverRecord, read, together
from plait.train.step import autocast

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """loss: the objective's, per position that counts; tokens: how many those were; bytes: of text that they stand for, 0
    where the loss is not that of predicting it; layers: how the solver of each recurrent layer record, by address."""

    loss: float
    tokens: int
    bytes: int
    layers: dict[str, SolverRecord] = field(default_factory=dict)

    @property
    def bits_per_byte(self) -> float | None:
        """None where the loss is not that of predicting text."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None


def heldout_loss(
    objective: Objective, shards: Shards, *, batch: int, length: int, tokens: int | None, precision: str = "float32"
) -> HeldOut:
    """Mean loss over the held-out documents, up to the piece in which `tokens` tokens have been predicted."""
    parts = heldout_answers(shards, length) if shards.meta.answers else pieces(heldout_documents(shards), length)
    return score_pieces(objective, up_to(parts, tokens), shards.token_bytes(), batch * length, precision)


@torch.no_grad()
def mean_loss(objective: Objective, batches: Iterable[Any], precision: str = "float32") -> HeldOut:
    """Mean of an objective's loss over batches, of which no text is known."""
    model, total, scored, layers = objective.model, 0.0, 0, {}
    training = model.training
    objective.eval()
    for batch in batches:
        sent = Channels()
        with autocast(model.device, precision):
            loss = objective(batch.to(model.device), channels=sent)
        total, scored = total + loss.total.item(), scored + int(loss.count)
        layers = together(layers, read(sent))
    objective.train(training)
    return HeldOut(total / max(1, scored), scored, 0, layers)


def heldout_documents(shards: Shards) -> Iterator[Iterator[Ids]]:
    """The ids of each held-out document, its end of text included, in the corpus's order."""
    ids = shards.tokens()
    for start, end in zip(*shards.documents("heldout"), strict=True):
        yield iter([ids[start:end].astype(np.int64)])


def heldout_answers(shards: Shards, length: int) -> Iterator[tuple[Ids, Ids]]:
    """(inputs, targets) of each held-out record, the targets of its answers alone."""
    ids, scored = shards.tokens(), shards.scored()
    assert scored is not None
    for start, end in zip(*shards.documents("heldout"), strict=True):
        document, learned = ids[start:end].astype(np.int64), scored[start:end]
        targets = np.append(np.where(learned[1:], document[1:], NO_TARGET), NO_TARGET)
        yield document[:length], targets[:length]


def score(
    objective: Objective,
    documents: Iterable[Iterator[Ids]],
    token_bytes: NDArray[np.int32],
    *,
    size: int,
    length: int,
    tokens: int | None = None,
    precision: str = "float32",
) -> HeldOut:
    """Mean loss over documents, each given as runs of ids; pieces of `length` are computed about `size` tokens at a time."""
    return score_pieces(objective, up_to(pieces(documents, length), tokens), token_bytes, size, precision)


def score_pieces(
    objective: Objective, pairs: Iterable[tuple[Ids, Ids]], token_bytes: NDArray[np.int32], size: int, precision: str
) -> HeldOut:
    """Mean loss over the targets of (inputs, targets), about `size` tokens at a time."""
    read_bytes = 0

    def batches() -> Iterator[Batch]:
        nonlocal read_bytes
        for batch in packed(pairs, token_bytes, size):
            read_bytes += batch.bytes
            yield batch

    heldout = mean_loss(objective, batches(), precision)
    return replace(heldout, bytes=read_bytes) if isinstance(objective, NextToken) else heldout


def pieces(documents: Iterable[Iterator[Ids]], length: int) -> Iterator[tuple[Ids, Ids]]:
    """(inputs, targets) of every piece; holds one run of ids at a time."""
    for document in documents:
        held = np.empty(0, dtype=np.int64)
        for run in document:
            held = np.concatenate([held, run])
            while len(held) > length:  # one more than a piece: its last token's target
                yield held[:length], held[1 : length + 1]
                held = held[length:]
        if len(held):
            yield held, np.append(held[1:], NO_TARGET)


def up_to(pairs: Iterable[tuple[Ids, Ids]], tokens: int | None) -> Iterator[tuple[Ids, Ids]]:
    """The first pieces that together have `tokens` targets, or all."""
    scored = 0
    for inputs, targets in pairs:
        if tokens is not None and scored >= tokens:
            return
        yield inputs, targets
        scored += int((targets != NO_TARGET).sum())


def packed(pairs: Iterable[tuple[Ids, Ids]], token_bytes: NDArray[np.int32], size: int) -> Iterator[Batch]:
    """Whole pieces in batches of at most `size` tokens, or of one piece."""
    row: list[tuple[Ids, Ids]] = []
    for piece in pairs:
        if row and sum(len(inputs) for inputs, _ in row) + len(piece[0]) > size:
            yield _batch(row, token_bytes)
            row = []
        row.append(piece)
    if row:
        yield _batch(row, token_bytes)


def _batch(parts: list[tuple[Ids, Ids]], token_bytes: NDArray[np.int32]) -> Batch:
    inputs, targets = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    cuts = np.cumsum([0, *(len(part) for part, _ in parts)])
    return Batch(
        torch.from_numpy(inputs)[None],
        torch.from_numpy(targets)[None],
        torch.from_numpy(cuts.astype(np.int32)),
        int(token_bytes[targets[targets != NO_TARGET]].sum()),
    )
