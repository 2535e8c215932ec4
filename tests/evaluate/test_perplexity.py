"""Perplexity of packed batches and of streamed text, against log-probabilities summed by hand."""

import math
import tracemalloc
from itertools import repeat

import numpy as np
import pytest
import torch

import plait
from plait.data import load_tokenizer
from plait.evaluate.perplexity import STEP, Perplexity, checked, perplexity_of_document
from plait.model import NextToken
from plait.train.heldout import score

TEXT = "Peter Piper picked a peck of pickled peppers. " * 40
DESIGN = plait.ModelConfig(
    vocab=257,
    dim=64,
    pattern="[D|A]F W",
    layers={"F": plait.SwiGLU(hidden=32), "W": plait.Attention(heads=2, window=9)},
)


@pytest.fixture(scope="module")
def model():
    return plait.build(DESIGN, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


@torch.no_grad()
def by_hand(model, ids, first=0):
    """-log p of ids[first + 1:] after all that stands before each."""
    logits, _ = model(torch.tensor([ids]))
    logp = logits[0, :-1].log_softmax(-1)
    return -logp[range(first, len(ids) - 1), ids[first + 1 :]].sum().item()


def in_pieces(model, ids, length):
    """By hand: pieces from an empty state, each with the next one's first token as its last target."""
    return sum(by_hand(model, ids[start : start + length + 1]) for start in range(0, len(ids) - 1, length))


def whole(model, tokenizer, pieces, **how):
    return perplexity_of_document(model, tokenizer, pieces, context=None, **how)


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
@pytest.mark.parametrize("length", [1, 5, 40, 1_000])
def test_pieces(model, tokenizer, size, length):
    """However many are computed at once, and however the text comes."""
    documents = [tokenizer.encode(text) + [256] for text in (TEXT[:90], "", "a", TEXT[:41])]
    runs = (iter(np.array_split(np.array(ids), 3)) for ids in documents)
    model.train()
    got = score(NextToken(model), runs, tokenizer.byte_lengths, size=size, length=length)
    assert model.training
    model.eval()
    assert got.loss * got.tokens == pytest.approx(sum(in_pieces(model, ids, length) for ids in documents), rel=1e-9)
    assert (got.tokens, got.bytes) == (90 + 0 + 1 + 41, 89 + 0 + 0 + 40)


def test_no_more_pieces_than_asked_for(model, tokenizer):
    def documents():
        yield iter([np.array(tokenizer.encode(TEXT[:60]))])
        raise AssertionError("read past the tokens that were asked for")

    got = score(NextToken(model), documents(), tokenizer.byte_lengths, size=16, length=10, tokens=35)
    assert got.tokens == 40


@pytest.mark.parametrize("context", [7, None])
def test_a_document_is_measured_as_held_out_text_is(model, tokenizer, context):
    text = TEXT[:700]
    got = perplexity_of_document(model, tokenizer, [text[:100], text[100:]], context=context)
    assert got.nats == pytest.approx(in_pieces(model, [*tokenizer.encode(text), 256], context or 10_000), rel=1e-9)
    assert (got.tokens, got.bytes) == (700, 699)
    assert perplexity_of_document(model, tokenizer, [], context=context).tokens == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_is_one_line_that_names_the_weight(tokenizer, value):
    model = plait.build(DESIGN)
    with torch.no_grad():
        next(model.slots[1].parameters()).fill_(value)
    with pytest.raises(
        ValueError, match=r"the model is broken: its loss on this text is nan; the weights of \S+ \(.*are not finite"
    ) as said:
        checked(model, whole(model, tokenizer, [TEXT]))
    assert "\n" not in str(said.value)


def test_a_hopeless_model_has_an_infinite_perplexity_and_no_text_has_none(model):
    assert Perplexity(1e6, 10, 10).perplexity == math.inf
    with pytest.raises(ValueError, match="stand for no text"):
        checked(model, Perplexity(1.0, 1, 0))
    with pytest.raises(ValueError, match="its loss on this text is inf; its weights are finite"):
        checked(model, Perplexity(math.inf, 1, 1))


def test_units():
    two = Perplexity(nats=6 * math.log(2), tokens=3, bytes=12)
    assert two.nats_per_token == pytest.approx(2 * math.log(2))
    assert two.perplexity == pytest.approx(4)
    assert two.bits_per_byte == pytest.approx(0.5)
    assert two + two == Perplexity(two.nats * 2, 6, 24)


@pytest.mark.parametrize("size", [1, 7, 600, 10_000])
def test_streaming_is_the_whole(model, tokenizer, size):
    got = whole(model, tokenizer, [TEXT[i : i + size] for i in range(0, len(TEXT), size)])
    assert len(TEXT) > 3 * STEP
    assert got.nats == pytest.approx(by_hand(model, [*tokenizer.encode(TEXT), 256]), rel=1e-9)
    assert (got.tokens, got.bytes) == (len(TEXT), len(TEXT) - 1)


@pytest.mark.parametrize("tokens", [1, 600, STEP, 10_000])
def test_a_part(model, tokenizer, tokens):
    got = whole(model, tokenizer, [TEXT], tokens=tokens)
    assert got.nats == pytest.approx(by_hand(model, [*tokenizer.encode(TEXT), 256][: tokens + 1]), rel=1e-9)
    assert got.tokens == min(tokens, len(TEXT))


def test_memory_does_not_grow(tokenizer):
    """The ids of the text alone would be 3 MiB."""
    design = plait.ModelConfig(vocab=257, dim=64, pattern="D", layers={"D": plait.GatedDeltaNet(heads=1, head_dim=16)})
    model = plait.build(design)
    tracemalloc.start()
    result = whole(model, tokenizer, repeat(TEXT[:STEP], 768))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.tokens == 768 * STEP
    assert peak < 2**20  # torch's own records of calls, until they are collected


@pytest.mark.parametrize("context", [7, None])
@pytest.mark.parametrize("pieces", [[], ["", ""]])
def test_nothing_to_score(model, tokenizer, pieces, context):
    nothing = perplexity_of_document(model, tokenizer, pieces, context=context)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        checked(model, nothing)


@pytest.mark.parametrize("context", [8, None])
def test_refusals(tokenizer, context):
    small = plait.build(DESIGN.replace(vocab=100))
    with pytest.raises(ValueError, match="the tokenizer has 257 ids, but the model's vocabulary is 100"):
        perplexity_of_document(small, tokenizer, [TEXT], context=context)


def test_reads_no_more_than_asked(model, tokenizer):
    def pieces():
        yield TEXT
        raise AssertionError("read past the tokens that were asked for")

    assert whole(model, tokenizer, pieces(), tokens=50).tokens == 50
