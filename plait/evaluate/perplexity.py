"""How well a model predicts text: nats per token, perplexity, bits per byte."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.data import Tokenizer
from plait.layers import Channels
from plait.model import CrossEntropy, LanguageModel, NextToken
from plait.state import ModelState
from plait.train.guard import nonfinite_weights
from plait.train.heldout import HeldOut, score
from plait.train.solver import SolverRecord, read, together

STEP = 512  # tokens read in one call while streaming


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`nats`: sum of -log p over the `tokens` that were predicted; `bytes`: UTF-8 bytes of text they stand for;
    `layers`: how the solver of each recurrent layer record, by address."""

    nats: float
    tokens: int
    bytes: int
    layers: dict[str, SolverRecord] = field(default_factory=dict)

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:  # above 709 nats a token
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike the others."""
        return self.nats / math.log(2) / self.bytes

    @classmethod
    def of(cls, heldout: HeldOut) -> "Perplexity":
        return cls(heldout.loss * heldout.tokens, heldout.tokens, heldout.bytes, heldout.layers)

    def __add__(self, other: Self) -> "Perplexity":
        """Of two texts together."""
        layers = together(self.layers, other.layers)
        return Perplexity(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes, layers)


def perplexity_of_document(
    model: LanguageModel,
    tokenizer: Tokenizer,
    text_pieces: Iterable[str],
    *,
    context: int | None,
    tokens: int | None = None,
    precision: str = "float32",
) -> Perplexity:
    """Over one document and its end, as training measures held-out ones: in pieces of `context` tokens, each from an empty
    state, or whole where that is None. Nothing scored is no error: the document may be one of many."""
    if tokenizer.vocab > model.design.vocab:
        raise ValueError(f"the tokenizer has {tokenizer.vocab} ids, but the model's vocabulary is {model.design.vocab}")
    lengths = tokenizer.byte_lengths
    if context is not None:
        ids = (np.asarray(tokenizer.encode(piece), dtype=np.int64) for piece in text_pieces)
        document = chain(ids, [np.array([tokenizer.eos])])
        size = max(context, STEP)
        how = {"size": size, "length": context, "tokens": tokens}
        return Perplexity.of(score(NextToken(model), [document], lengths, **how, precision=precision))
    total, reader = Perplexity(0.0, 0, 0), _Reader(model, None)
    with torch.no_grad():
        for ids in _steps(tokenizer, text_pieces, None if tokens is None else tokens + 1, STEP, end=True):
            nats, scored = reader.read(ids)
            total += Perplexity(nats, scored, int(lengths[ids[len(ids) - scored :]].sum()))
    return total + Perplexity(0.0, 0, 0, reader.layers)


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
    return checked(model, total + Perplexity(0.0, 0, 0, reader.layers))


def _steps(
    tokenizer: Tokenizer, pieces: Iterable[str], tokens: int | None, size: int, end: bool = False
) -> Iterator[np.ndarray]:
    """Ids in runs of `size`, at most `tokens` in all; holds one piece of the text at a time. `end`: and the end of text."""
    held, left = np.empty(0, dtype=np.int64), math.inf if tokens is None else tokens
    ends = [[tokenizer.eos]] if end else []
    for ids in chain(map(tokenizer.encode, pieces), ends):
        held = np.concatenate([held, np.asarray(ids, dtype=np.int64)])
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
        self.layers: dict[str, SolverRecord] = {}

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
        sent = Channels()
        hidden, state = self.model.features(tokens, self.state, channels=sent)
        self.layers = together(self.layers, read(sent))
        assert state is not None  # one was given
        self.state = state
        return hidden

    def _nats(self, features: Float[Tensor, "t d"], targets: Int[Tensor, " t"]) -> float:
        return self.model.head.loss(features[None], CrossEntropy(targets[None])).total.item()


def checked(model: LanguageModel, total: Perplexity) -> Perplexity:
    """`total`. Raises ValueError where it measures nothing, or the model is broken."""
    if total.tokens == 0:
        raise ValueError("nothing to score: the text has fewer than two tokens")
    if total.bytes == 0:
        raise ValueError("nothing to score: the tokens that were predicted stand for no text")
    if not math.isfinite(total.nats):
        broken = nonfinite_weights(model)
        cause = f"{broken} are not finite" if broken else "its weights are finite, what it computes is not"
        raise ValueError(f"the model is broken: its loss on this text is {total.nats}; {cause}")
    return total
