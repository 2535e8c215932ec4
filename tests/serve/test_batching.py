"""Requests that come and go on one pool: each is written as it would be alone, whoever its mates are."""

import random
import threading

import pytest
import torch

import plait
from plait.engine import Sampling, generate_tokens
from plait.serve import Batch, Request, batching
from plait.serve.batching import Closed

VOCAB = 61
PATTERNS = ["(AF)2", "DF AF", "M WF", "[D|A]F X", "G R K"]
ASKED = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.2, top_p=0.8, repetition_penalty=1.3),
    Sampling(repetition_penalty=1.5),
]


def built(pattern: str, **options) -> plait.LanguageModel:
    """In float64, where another order of sums changes no choice."""
    layers = {"W": {"kind": "attention", "window": 5}} if "W" in pattern else {}
    design = plait.ModelConfig(vocab=VOCAB, dim=64, pattern=pattern, layers=layers, **options)
    return plait.build(design, seed=3, dtype=torch.float64)


class Heard(list):
    """What a request was told."""

    def request(self, ids, max_tokens, **how) -> Request:
        return Request(ids, max_tokens, self.append, **how)

    @property
    def tokens(self) -> list[int]:
        assert self[-1] is None
        return self[:-1]


def alone(model, request: Request) -> list[int]:
    sampling = request.sampling.replace(seed=request.seed)
    (end,) = request.ends or (None,)
    return generate_tokens(model, [request.ids], max_tokens=request.max_tokens, sampling=sampling, eos=end)[0]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_requests_are_written_as_alone(pattern, monkeypatch):
    monkeypatch.setattr(batching, "at_once", lambda device: 7)  # prompts are read in pieces between steps
    model, draw = built(pattern), random.Random(5)
    batch, told = Batch(model, rows=3, keep=2), []
    for n in range(14):
        heard = Heard()
        ids = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 30))]
        how = {"sampling": ASKED[n % len(ASKED)], "seed": draw.randrange(100), "ends": (draw.randrange(VOCAB),)}
        request = heard.request(ids, draw.randint(1, 12), **how)
        told.append((request, heard))
        batch.submit(request)
        for _ in range(draw.randint(0, 4)):
            batch.turn()
        if n % 5 == 4:
            batch.cancel(told[-2][0])
    while batch.live or batch.waiting or batch._reading:
        batch.turn()
    for request, heard in told:
        if not request.cancelled:
            assert heard.tokens == alone(model, request) == request.tokens
    assert batch.pool.free_rows == 3 and batch.requests >= 10


def test_a_turn_reads_only_its_own_tokens():
    model = built("DF AF")
    batch, ids = Batch(model, keep=4), [3, 1, 4, 1, 5]
    for known in (0, 5 + 3, 5 + 2 * 3 + 2):  # all but the last token, which was chosen and not read
        heard = Heard()
        request = heard.request(ids, 4)
        batch.submit(request)
        while len(heard) < 5:
            batch.turn()
        assert (request.known, heard.tokens) == (known, alone(model, request))
        ids = [*ids, *heard.tokens, 7]
    again = Heard()
    request = again.request(ids[:-1], 4)
    batch.submit(request)
    while len(again) < 5:
        batch.turn()
    assert again.tokens == alone(model, request)


def test_equal_prompts_are_read_once():
    batch, heard = Batch(built("DF")), [Heard(), Heard()]
    requests = [each.request([1, 2, 3], 3, sampling=Sampling(temperature=1.0), seed=n) for n, each in enumerate(heard)]
    for request in requests:
        batch.submit(request)
    while len(heard[1]) < 4:
        batch.turn()
    assert [request.known for request in requests] == [0, 3]
    assert [each.tokens for each in heard] == [alone(batch.model, request) for request in requests]


def test_no_more_states_are_kept_than_asked_for():
    batch = Batch(built("DF"), keep=0)
    heard = Heard()
    batch.submit(heard.request([1, 2, 3], 2))
    while len(heard) < 3:
        batch.turn()
    assert not batch._kept
    few = Batch(built("DF"), keep=3)
    for n in range(6):
        few.submit(Heard().request([n, 2, 3], 2))
    while few.live or few.waiting:
        few.turn()
    assert len(few._kept) == 3


def test_a_long_prompt_does_not_hold_up_what_is_being_written(monkeypatch):
    monkeypatch.setattr(batching, "at_once", lambda device: 2)
    batch, first, long = Batch(built("DF")), Heard(), Heard()
    batch.submit(first.request([1], 20))
    batch.turn()
    batch.submit(long.request([2] * 10, 1))
    before = len(first)
    for _ in range(5):
        assert not long
        batch.turn()
        assert len(first) > before and (before := len(first))
    assert len(long) == 2  # it is five pieces long


def test_what_is_not_finite_ends_its_own_request():
    model = built("DF", tie_embeddings=False)
    model.embed.weight.data[9] = torch.nan
    batch, bad, good = Batch(model), Heard(), Heard()
    batch.submit(bad.request([1, 9], 3))
    batch.submit(good.request([1, 2], 3))
    while len(good) < 4:
        batch.turn()
    assert isinstance(bad[-1], ValueError) and "not finite" in str(bad[-1])
    assert len(good.tokens) == 3 and batch.pool.free_rows == batch.pool.rows


def test_without_memory_whoever_is_there_is_told_and_others_may_come(monkeypatch):
    batch, lost, later = Batch(built("DF")), Heard(), Heard()
    batch.submit(lost.request([1, 2], 9))
    batch.turn()
    with monkeypatch.context() as patch:
        patch.setattr(batch, "_write", lambda: (_ for _ in ()).throw(RuntimeError("out of memory")))
        batch.turn()
    assert str(lost[-1]) == "out of memory"
    request = later.request([1, 2], 3)
    batch.submit(request)
    while len(later) < 4:
        batch.turn()
    assert later.tokens == alone(batch.model, request) and batch.pool.free_rows == batch.pool.rows


def test_closing_tells_those_who_wait():
    batch, heard = Batch(built("DF"), rows=1), [Heard(), Heard()]
    for each in heard:
        batch.submit(each.request([1], 10_000))
    thread = threading.Thread(target=batch.run)
    thread.start()
    batch.close()
    thread.join(60)
    assert not thread.is_alive()
    assert all(isinstance(each[-1], Closed) for each in heard)
    with pytest.raises(Closed, match="being stopped"):
        batch.submit(Heard().request([1], 1))


@pytest.mark.parametrize(
    ("ids", "max_tokens", "message"),
    [
        ([], 3, "the prompt is empty"),
        ([VOCAB], 3, "outside the model's vocabulary"),
        ([1], 0, "max_tokens must be"),
        (
            [1] * 9,
            8,
            r"the prompt has 9 tokens, and with max_tokens=8 it would have more than the 16 that there is room for",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused_at_once(ids, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        Batch(built("DF"), length=16).submit(Heard().request(ids, max_tokens))


@pytest.mark.parametrize("how", [{"rows": 0}, {"keep": -1}, {"length": 1}])
def test_sizes_are_whole_numbers(how):
    with pytest.raises(ValueError, match=next(iter(how))):
        Batch(built("DF"), **how)
