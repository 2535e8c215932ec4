"""Perplexity of packed batches and of streamed text, against log-probabilities summed by hand."""

import math
import tracemalloc
from itertools import chain, repeat

import numpy as np
import pytest
import torch

import plait
from plait.data import load_tokenizer
from plait.evaluate.perplexity import STEP, Perplexity, checked, perplexity_of_document, perplexity_of_text
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
        perplexity_of_text(model, tokenizer, [TEXT])
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
    pieces = [TEXT[i : i + size] for i in range(0, len(TEXT), size)]
    got = perplexity_of_text(model, tokenizer, pieces)
    assert len(TEXT) > 3 * STEP
    assert got.nats == pytest.approx(by_hand(model, tokenizer.encode(TEXT)), rel=1e-9)
    assert (got.tokens, got.bytes) == (len(TEXT) - 1, len(TEXT) - 1)


@pytest.mark.parametrize("tokens", [2, 600, STEP, 10_000])
def test_a_part(model, tokenizer, tokens):
    got = perplexity_of_text(model, tokenizer, [TEXT], tokens=tokens)
    assert got.nats == pytest.approx(by_hand(model, tokenizer.encode(TEXT)[:tokens]), rel=1e-9)
    assert got.tokens == min(tokens, len(TEXT)) - 1


@pytest.mark.parametrize("context", [2, 5, 64, 1000])
def test_bounded_context(model, tokenizer, context):
    """Every token is predicted from no more than `context` before it, and from half of that once there are as many."""
    ids = tokenizer.encode(TEXT[:300])
    step = min(STEP, context // 2)
    want, seen = 0.0, 0  # tokens in the state
    for start in range(0, len(ids), step):
        run = ids[start : start + step]
        again = min(start, context // 2)
        if seen + len(run) > context:
            seen = again
        if start == 0:
            want += by_hand(model, run) if len(run) > 1 else 0.0
        else:
            want += by_hand(model, ids[start - seen : start + len(run)], first=seen - 1)
        seen += len(run)
        assert seen <= context
    got = perplexity_of_text(model, tokenizer, [TEXT[:300]], context=context)
    assert got.nats == pytest.approx(want, rel=1e-9)
    assert got.tokens == 299


def test_context_is_what_rope_allows(tokenizer):
    limited = DESIGN.replace(
        layers={"A": plait.Attention(rope=plait.RoPE(max_positions=32)), "F": plait.SwiGLU(hidden=32)}, pattern="AF"
    )
    model = plait.build(limited)
    assert perplexity_of_text(model, tokenizer, [TEXT]).tokens == len(TEXT) - 1


def test_memory_does_not_grow(tokenizer):
    """The ids of the text alone would be 3 MiB."""
    design = plait.ModelConfig(vocab=257, dim=64, pattern="D", layers={"D": plait.GatedDeltaNet(heads=1, head_dim=16)})
    model = plait.build(design)
    tracemalloc.start()
    result = perplexity_of_text(model, tokenizer, repeat(TEXT[:STEP], 768))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.tokens == 768 * STEP - 1
    assert peak < 2**20  # torch's own records of calls, until they are collected


@pytest.mark.parametrize("pieces", [[], [""], ["a"], ["", "a", ""]])
def test_nothing_to_score(model, tokenizer, pieces):
    with pytest.raises(ValueError, match="fewer than two tokens"):
        perplexity_of_text(model, tokenizer, pieces)


def test_refusals(model, tokenizer):
    with pytest.raises(ValueError, match="context must be at least 2"):
        perplexity_of_text(model, tokenizer, [TEXT], context=1)
    small = plait.build(DESIGN.replace(vocab=100))
    with pytest.raises(ValueError, match="the tokenizer has 257 ids, but the model's vocabulary is 100"):
        perplexity_of_text(small, tokenizer, [TEXT])
    with pytest.raises(ValueError, match="the tokenizer has 257 ids, but the model's vocabulary is 100"):
        perplexity_of_document(small, tokenizer, [TEXT], context=8)


def test_reads_no_more_than_asked(model, tokenizer):
    def pieces():
        yield TEXT
        raise AssertionError("read past the tokens that were asked for")

    assert perplexity_of_text(model, tokenizer, chain(pieces()), tokens=50).tokens == 49
