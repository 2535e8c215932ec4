"""Perplexity of packed batches and of streamed text, against log-probabilities summed by hand."""

import math
import tracemalloc
from itertools import chain, repeat

import pytest
import torch

import plait
from plait.data import Batch, load_tokenizer
from plait.evaluate.perplexity import STEP, Perplexity, perplexity, perplexity_of_text

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


def test_batches(model):
    ids = torch.randint(256, (1, 90))
    targets = torch.cat([ids[:, 1:], torch.tensor([[-100]])], 1)
    targets[0, 39] = -100
    batch = Batch(ids, targets, torch.tensor([0, 40, 90], dtype=torch.int32), bytes=88)
    got = perplexity(model, [batch, batch])
    want = by_hand(model, ids[0, :40].tolist()) + by_hand(model, ids[0, 40:].tolist())
    assert got.nats == pytest.approx(2 * want, rel=1e-9)
    assert (got.tokens, got.bytes) == (176, 176)
    assert perplexity(model, repeat(batch), tokens=100) == got  # whole batches, from an endless loader too


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
    with pytest.raises(ValueError, match="nothing to score"):
        perplexity(model, [])


def test_reads_no_more_than_asked(model, tokenizer):
    def pieces():
        yield TEXT
        raise AssertionError("read past the tokens that were asked for")

    assert perplexity_of_text(model, tokenizer, chain(pieces()), tokens=50).tokens == 49
