"""How well a model predicts text: nats per token, perplexity, bits per byte."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.data import Batch, Tokenizer
from plait.model import CrossEntropy, LanguageModel, token_loss
from plait.state import ModelState
from plait.train.solver import Fared, Stats, read, together

STEP = 512  # tokens read in one call while streaming


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`nats`: sum of -log p over the `tokens` that were predicted; `bytes`: UTF-8 bytes of text they stand for;
    `layers`: how the solver of each recurrent layer fared, by address."""

    nats: float
    tokens: int
    bytes: int
    layers: dict[str, Fared] = field(default_factory=dict)

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike the others."""
        return self.nats / math.log(2) / self.bytes

    def __add__(self, other: Self) -> "Perplexity":
        """Of two texts together."""
        layers = together(self.layers, other.layers)
        return Perplexity(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes, layers)


@torch.no_grad()
def perplexity(model: LanguageModel, batches: Iterable[Batch], tokens: int | None = None) -> Perplexity:
    """Over packed batches, such as `Loader(shards, "heldout", ..., order="sequential", epochs=1)` gives.

    Stops after the batch in which `tokens` targets have been scored. Raises ValueError where there was none to score.
    """
    total = Perplexity(0.0, 0, 0)
    for batch in batches:
        if tokens is not None and total.tokens >= tokens:
            break
        batch = batch.to(model.device)
        stats: Stats = {}
        nats, scored = token_loss(model, batch.inputs, batch.targets, cu_seqlens=batch.cu_seqlens, stats=stats)
        total += Perplexity(nats.item(), int(scored), batch.bytes, read(stats))
    return _checked(total)


@torch.no_grad()
def perplexity_of_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    text_pieces: Iterable[str],
    *,
    context: int | None = None,
    tokens: int | None = None,
) -> Perplexity:
    """Over one text of any length, streamed through the model's state: memory does not grow with the text.

    `text_pieces` are read one after the other and tokenized each on its own, so cut them where words end (lines do).
    With `context`, the state starts afresh whenever it has seen that many tokens and first reads the last half of them
    again, so that every token is predicted from context / 2 to `context` tokens. It defaults to what the model's RoPE
    allows; without one the state is carried through, and only full attention's keys grow. The first token is not
    scored. Stops after `tokens` tokens. Raises ValueError where the text has fewer than two.
    """
    if tokenizer.vocab > model.design.vocab:
        raise ValueError(f"the tokenizer has {tokenizer.vocab} ids, but the model's vocabulary is {model.design.vocab}")
    context = context or model.max_positions
    if context is not None and context < 2:
        raise ValueError(f"context must be at least 2 tokens, got {context}")
    lengths = tokenizer.byte_lengths
    total, reader = Perplexity(0.0, 0, 0), _Reader(model, context)
    for ids in _steps(tokenizer, text_pieces, tokens, min(STEP, (context or 2 * STEP) // 2)):
        nats, scored = reader.read(ids)
        if scored:
            total += Perplexity(nats, scored, int(lengths[ids[len(ids) - scored :]].sum()))
    return _checked(total + Perplexity(0.0, 0, 0, reader.layers))


def _steps(tokenizer: Tokenizer, pieces: Iterable[str], tokens: int | None, size: int) -> Iterator[np.ndarray]:
    """Ids in runs of `size`, at most `tokens` in all; holds one piece of the text at a time."""
    held, left = np.empty(0, dtype=np.int64), math.inf if tokens is None else tokens
    for piece in pieces:
        held = np.concatenate([held, np.asarray(tokenizer.encode(piece), dtype=np.int64)])
        while len(held) >= size and left > 0:
            run = held[: int(min(size, left))]
            yield run
            held, left = held[len(run) :], left - len(run)
        if left <= 0:
            return
    if len(held):
        yield held[: int(min(len(held), left))]


class _Reader:
    """Carries a model's state, and what it expects next, through a text."""

    def __init__(self, model: LanguageModel, context: int | None):
        self.model, self.context = model, context
        self.state: ModelState = model.init_state()
        self.recent = torch.empty(1, 0, dtype=torch.long, device=model.device)  # what a fresh state reads again
        self.expected: Float[Tensor, "1 d"] | None = None  # the features that predict the next token
        self.layers: dict[str, Fared] = {}

    def read(self, ids: np.ndarray) -> tuple[float, int]:
        """Nats of these tokens, and how many were scored: all but the text's first."""
        tokens = torch.from_numpy(ids)[None].to(self.model.device)
        if self.context is not None:
            if self.state.lengths[0] + len(ids) > self.context:
                self.state = self.model.init_state()
                for part in self.recent.split(STEP, 1):
                    hidden = self._advance(part)
                    self.expected = hidden[:, -1]
            self.recent = torch.cat([self.recent, tokens], 1)[:, -(self.context // 2) :]
        hidden = self._advance(tokens)[0]  # (t, d)
        targets = tokens[0]
        if self.expected is None:
            features, targets = hidden[:-1], targets[1:]
        else:
            features = torch.cat([self.expected, hidden[:-1]])
        self.expected = hidden[-1:]
        return self._nats(features, targets), len(targets)

    def _advance(self, tokens: Int[Tensor, "1 t"]) -> Float[Tensor, "1 t d"]:
        stats: Stats = {}
        hidden, state = self.model.features(tokens, self.state, stats=stats)
        self.layers = together(self.layers, read(stats))
        assert state is not None  # one was given
        self.state = state
        return hidden

    def _nats(self, features: Float[Tensor, "t d"], targets: Int[Tensor, " t"]) -> float:
        return self.model.head.loss(features[None], CrossEntropy(targets[None])).total.item()


def _checked(total: Perplexity) -> Perplexity:
    if total.tokens == 0:
        raise ValueError("nothing to score: the text has fewer than two tokens")
    return total
