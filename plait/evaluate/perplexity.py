"""How well a model predicts text: nats per token, perplexity, bits per byte."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Self

import numpy as np
import torch
from jaxtyping import Float
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
    total, reader = Perplexity(0.0, 0, 0), _Reader(model)
    with torch.no_grad():
        for ids in _steps(tokenizer, text_pieces, None if tokens is None else tokens + 1):
            nats, scored = reader.read(ids)
            total += Perplexity(nats, scored, int(lengths[ids[len(ids) - scored :]].sum()))
    return total + Perplexity(0.0, 0, 0, reader.layers)


def _steps(tokenizer: Tokenizer, pieces: Iterable[str], tokens: int | None) -> Iterator[np.ndarray]:
    """Ids in runs of STEP, the end of text last, at most `tokens` in all; holds one piece of the text at a time."""
    held, left = np.empty(0, dtype=np.int64), math.inf if tokens is None else tokens
    for ids in chain(map(tokenizer.encode, pieces), [[tokenizer.eos]]):
        held = np.concatenate([held, np.asarray(ids, dtype=np.int64)])
        while len(held) >= STEP and left > 0:
            run = held[: int(min(STEP, left))]
            yield run
            held, left = held[len(run) :], left - len(run)
        if left <= 0:
            return
    if len(held):
        yield held[: int(min(len(held), left))]


class _Reader:
    """Carries a model's state, and what it expects next, through a text."""

    def __init__(self, model: LanguageModel):
        self.model = model
        self.state: ModelState | None = model.init_state()
        self.expected: Float[Tensor, "1 d"] | None = None  # the features that predict the next token
        self.layers: dict[str, SolverRecord] = {}

    def read(self, ids: np.ndarray) -> tuple[float, int]:
        """Nats of these tokens, and how many were scored: all but the text's first."""
        tokens, sent = torch.from_numpy(ids)[None].to(self.model.device), Channels()
        found, self.state = self.model.features(tokens, self.state, channels=sent)
        self.layers = together(self.layers, read(sent))
        hidden, targets = found[0], tokens[0]
        if self.expected is None:
            features, targets = hidden[:-1], targets[1:]
        else:
            features = torch.cat([self.expected, hidden[:-1]])
        self.expected = hidden[-1:]
        return self.model.head.loss(features[None], CrossEntropy(targets[None])).total.item(), len(targets)


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
