"""The sampler beside transformers' own processors, and its draws beside the probabilities."""

import random

import pytest
import torch
from transformers.generation import logits_process as theirs

from plait.engine.sampling import Sampler, Sampling, draw, narrow


def logits(rows=5, vocab=50, seed=0):
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("ours", "warpers"),
    [
        ({}, []),
        ({"top_k": 1}, [theirs.TopKLogitsWarper(1)]),
        ({"top_k": 7}, [theirs.TopKLogitsWarper(7)]),
        ({"top_k": 500}, [theirs.TopKLogitsWarper(500)]),
        ({"top_p": 0.01}, [theirs.TopPLogitsWarper(0.01)]),
        ({"top_p": 0.7}, [theirs.TopPLogitsWarper(0.7)]),
        ({"top_p": 1.0}, [theirs.TopPLogitsWarper(1.0)]),
        ({"min_p": 0.05}, [theirs.MinPLogitsWarper(0.05)]),
        ({"min_p": 1.0}, [theirs.MinPLogitsWarper(1.0)]),
        (
            {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
            [theirs.TopKLogitsWarper(20), theirs.TopPLogitsWarper(0.9), theirs.MinPLogitsWarper(0.02)],
        ),
    ],
)
def test_what_may_be_sampled_is_what_transformers_allows(temperature, ours, warpers):
    for seed in range(10):
        scores = theirs.TemperatureLogitsWarper(temperature)(None, logits(seed=seed))
        for warper in warpers:
            scores = warper(None, scores)
        got = narrow(logits(seed=seed), Sampling(temperature=temperature, **ours))
        torch.testing.assert_close(got, scores - scores.amax(-1, keepdim=True))


def test_the_repetition_penalty_is_transformers():
    prompts = [[3, 3, 7], [1], [49, 0]]
    sampler = Sampler(Sampling(repetition_penalty=1.7), prompts, 50, torch.device("cpu"))
    held = torch.tensor([[3, 3, 7], [1, 1, 1], [49, 0, 0]])
    for step in range(20):
        scores = theirs.RepetitionPenaltyLogitsProcessor(1.7)(held, logits(3, seed=step))
        chosen = sampler.choose(logits(3, seed=step))
        assert chosen.tolist() == scores.argmax(-1).tolist()
        held = torch.cat([held, chosen[:, None]], 1)


def test_draws_have_the_probabilities():
    count = 4000
    even = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    scores = narrow(logits(1), Sampling(temperature=1.0, top_k=12))
    drawn = torch.bincount(draw(scores.expand(count, -1), even), minlength=50)
    assert (drawn - count * scores[0].softmax(-1)).abs().max() <= 1


def test_the_outermost_draws_stay_among_what_may_be_sampled():
    scores = torch.full((2, 9), -torch.inf)
    scores[:, 2:7] = torch.randn(2, 5)
    assert draw(scores, torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)).tolist() == [2, 6]


def test_rows_draw_their_own_numbers():
    sampler = Sampler(Sampling(temperature=1.0, seed=7), [[0]] * 3, 50, torch.device("cpu"))
    sampler.keep([1, 2])
    alone = random.Random(9)
    for step in range(5):
        scores = logits(2, seed=step)
        expected = draw(scores[1:], torch.tensor([[alone.random()]], dtype=torch.float64))
        assert sampler.choose(scores)[1] == expected[0]


def test_a_misspelled_option_is_named():
    with pytest.raises(ValueError, match="unknown key 'tempreature'; did you mean 'temperature'"):
        Sampling(tempreature=1.0)


@pytest.mark.parametrize("seed", [-5, -1, 0, 2**64])
def test_every_seed_has_numbers_of_its_own(seed):
    device = torch.device("cpu")
    rows = Sampler(Sampling(temperature=1.0, seed=seed), [[0]] * 12, 2**20, device).choose(torch.zeros(12, 2**20))
    assert len(set(rows.tolist())) == 12
    mirrored = Sampler(Sampling(temperature=1.0, seed=-seed - 100), [[0]] * 12, 2**20, device).choose(
        torch.zeros(12, 2**20)
    )
    assert not set(rows.tolist()) & set(mirrored.tolist())
    last = Sampler(Sampling(temperature=1.0, seed=seed + 11), [[0]], 2**20, device).choose(torch.zeros(1, 2**20))
    assert last[0] == rows[11]  # row 11 is what it would be alone
