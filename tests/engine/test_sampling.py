"""The sampler beside transformers' own processors, and its draws beside the probabilities."""

import itertools

import pytest
import torch
from transformers.generation import logits_process as theirs

from plait.engine.sampling import Narrowing, Options, Sampler, Sampling, draw, key, narrow, uniform

CPU = torch.device("cpu")
ALL = slice(None)


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
        got = narrowed(logits(seed=seed), [Sampling(temperature=temperature, **ours)] * 5)
        torch.testing.assert_close(got, scores - scores.amax(-1, keepdim=True))


def narrowed(scores, samplings):
    return narrow(scores, Options.of(samplings, [0] * len(samplings), CPU), Narrowing.of(samplings))


def test_rows_of_one_batch_may_ask_for_different_things():
    mixed = [
        Sampling(temperature=0.5),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=2.0, top_p=0.6),
        Sampling(temperature=1.0, top_k=9, min_p=0.1),
        Sampling(repetition_penalty=1.5),
    ]
    scores, positions = logits(), torch.arange(5)
    alone = [narrowed(scores[i : i + 1], [sampling])[0] for i, sampling in enumerate(mixed[:4])]
    torch.testing.assert_close(narrowed(scores, mixed)[:4], torch.stack(alone))
    together = Sampler(mixed, range(5), 50, CPU)
    together.hold(4, [int(scores[4].argmax())])
    got = together.choose(scores, ALL, positions)
    for i, sampling in enumerate(mixed):
        sampler = Sampler([sampling], [i], 50, CPU)
        sampler.hold(0, [int(scores[4].argmax())])
        assert sampler.choose(scores[i : i + 1], ALL, positions[i : i + 1])[0] == got[i]


def test_the_repetition_penalty_is_transformers():
    prompts = [[3, 3, 7], [1], [49, 0]]
    sampler = Sampler([Sampling(repetition_penalty=1.7)] * 3, [0] * 3, 50, CPU)
    for row, prompt in enumerate(prompts):
        sampler.hold(row, prompt)
    held = torch.tensor([[3, 3, 7], [1, 1, 1], [49, 0, 0]])
    for step in range(20):
        scores = theirs.RepetitionPenaltyLogitsProcessor(1.7)(held, logits(3, seed=step))
        chosen = sampler.choose(logits(3, seed=step), ALL, torch.full((3,), step))
        assert chosen.tolist() == scores.argmax(-1).tolist()
        held = torch.cat([held, chosen[:, None]], 1)


def test_draws_have_the_probabilities():
    count = 4000
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    scores = narrowed(logits(1), [Sampling(temperature=1.0, top_k=12)])
    drawn = torch.bincount(draw(scores.expand(count, -1), even), minlength=50)
    assert (drawn - count * scores[0].softmax(-1)).abs().max() <= 1


def test_the_outermost_draws_stay_among_what_may_be_sampled():
    scores = torch.full((2, 9), -torch.inf)
    scores[:, 2:7] = torch.randn(2, 5)
    assert draw(scores, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [2, 6]


def test_what_is_not_finite_gives_no_token():
    scores = torch.zeros(2, 9)
    scores[1, 4] = torch.nan
    assert (draw(scores, torch.full((2,), 0.5, dtype=torch.float64)) < 0).tolist() == [False, True]


def splitmix64(state, count):
    """The published generator, in Python's whole numbers."""
    mask, numbers = 2**64 - 1, []
    for _ in range(count):
        state = state + 0x9E3779B97F4A7C15 & mask
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        numbers.append(z ^ z >> 31)
    return numbers


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5, 2**64 - 1])
def test_random_numbers_are_those_of_splitmix64(seed):
    signed = seed - 2**64 if seed >> 63 else seed
    got = uniform(torch.full((8,), signed), torch.arange(8))
    assert got.tolist() == [(z >> 11) * 2.0**-53 for z in splitmix64(seed, 8)]


def test_the_generator_is_the_published_one():
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_rows_draw_their_own_numbers():
    sampling, scores = Sampling(temperature=1.0), logits(3)
    together = Sampler([sampling] * 3, [7, 8, 9], 50, CPU)
    alone = Sampler([sampling], [9], 50, CPU)
    for position in range(5):
        some = together.choose(scores[1:], torch.tensor([1, 2]), torch.tensor([40, position]))
        assert some[1] == alone.choose(scores[2:], ALL, torch.tensor([position]))[0]


def test_a_misspelled_option_is_named():
    with pytest.raises(ValueError, match="unknown key 'tempreature'; did you mean 'temperature'"):
        Sampling(tempreature=1.0)


def test_every_seed_has_numbers_of_its_own():
    seeds = [sign * (base + i) for base, sign in itertools.product((0, 5, 2**64), (1, -1)) for i in range(12)]
    drawn = uniform(torch.tensor([key(seed) for seed in seeds]), torch.zeros(len(seeds), dtype=torch.long))
    assert len(set(drawn.tolist())) == len(set(seeds))
