"""Which layers stay: arrangements against all that are allowed, and rules against what they must say of layers known."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

import plait
from plait.convert import Plan, student_of
from plait.convert.learned import at_budget
from plait.convert.measured import MOST
from plait.convert.select import RULES, Request, choose

# Zebra-Llama's published layers (configs/**/zebra_*_SFT.yaml): how many there are, and those that stay attention
PUBLISHED = [
    (16, [0, 5, 10, 14]),
    (16, [0, 2, 5, 8, 11, 14]),
    (16, list(range(0, 16, 2))),
    (28, [0, 5, 10, 16, 21, 26]),
    (28, [0, 3, 7, 10, 14, 18, 22, 26]),
    (28, list(range(0, 28, 2))),
    (32, [0, 4, 8, 12, 16, 20, 25, 30]),
    (32, list(range(0, 32, 2))),
]


def allowed(kept, values):
    """SMART's constraints, as its paper says them."""
    n, ends = len(values), len(values) // len(kept)
    best = lambda layers: max(layers, key=lambda i: values[i])  # noqa: E731
    gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
    equal = (kept[-1] - kept[0]) / (len(kept) - 1)
    even = all(equal - 1 < gap < equal + 1 for gap in gaps)
    return kept[0] == best(range(ends)) and kept[-1] == best(range(n - ends, n)) and even


@pytest.mark.parametrize("layers", [5, 9, 12])
def test_the_chosen_arrangement_is_the_best_of_all_that_are_allowed(layers):
    generator = torch.Generator().manual_seed(layers)
    for keep in range(2, layers + 1):
        values = torch.randn(layers, generator=generator).tolist()
        scores = {f"A#{i}": value for i, value in enumerate(values)}
        best = max(
            (k for k in combinations(range(layers), keep) if allowed(k, values)),
            key=lambda k: sum(values[i] for i in k),
        )
        assert choose(scores, keep, "kl") == [f"A#{i}" for i in best]


@pytest.mark.parametrize(("layers", "kept"), PUBLISHED, ids=lambda x: str(x))
def test_published_arrangements_are_allowed(layers, kept):
    scores = {f"A#{i}": float(i in kept) for i in range(layers)}
    assert choose(scores, len(kept), "kl") == [f"A#{i}" for i in kept]


def test_other_rules_keep_the_largest_scores():
    scores = {"A#0": 1.0, "A#1": 3.0, "A#2": 2.0, "A#3": 3.0}
    assert choose(scores, 2, "halo") == ["A#1", "A#3"] and choose(scores, 3, "halo") == ["A#1", "A#2", "A#3"]
    assert choose(scores, 0, "kl") == choose(scores, 0, "halo") == []
    assert choose(scores, 1, "kl") == ["A#1"] and choose(scores, 4, "kl") == list(scores)
    with pytest.raises(ValueError, match="5 layers cannot stay of 4"):
        choose(scores, 5, "kl")


def teacher_of(layers=4):
    layer = {"kind": "attention", "heads": 4, "kv_heads": 2}
    return plait.build(
        {"vocab": 61, "dim": 64, "pattern": f"(AF){layers}", "layers": {"A": layer}}, dtype=torch.float64
    )


def some_data(count=3, length=16):
    generator, data = torch.Generator().manual_seed(0), []
    for _ in range(count):
        x = torch.randint(0, 61, (2, length + 1), generator=generator)
        data.append(SimpleNamespace(inputs=x[:, :-1], targets=x[:, 1:], cu_seqlens=None))
    return data


def request(**fields):
    return Request(**{"mixer": "gated_deltanet", "keep": 2, **fields})


def divergence(teacher, model, data):
    """In nats a token, by torch's own."""
    found = []
    for batch in data:
        ours, theirs = (m(batch.inputs)[0].log_softmax(-1).flatten(0, 1) for m in (model, teacher))
        found.append(torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True))
    return float(sum(found)) / len(found)


@torch.no_grad()
def test_kl_is_what_restoring_a_layer_takes_away():
    teacher, data = teacher_of(), some_data()
    places = [f"A#{i}" for i in range(4)]
    calibrated = {"text": torch.cat([batch.inputs for batch in data])}
    everything = student_of(teacher, Plan.of(teacher, "", dict.fromkeys(places, "gated_deltanet")), **calibrated)
    base = divergence(teacher, everything, data)
    scores = RULES["kl"](teacher, request(), data)
    assert (
        list(scores.scores) == places
        and scores.tokens == 7 * sum(b.inputs.numel() for b in data)
        and scores.seconds > 0
    )
    for address in places:
        but_one = {place: "gated_deltanet" for place in places if place != address}
        restored = divergence(teacher, student_of(teacher, Plan.of(teacher, "", but_one), **calibrated), data)
        assert scores.scores[address] == pytest.approx(base - restored, abs=1e-12)


@torch.no_grad()
def test_kl_reads_the_student_that_it_is_given():
    """One whose layers are all the teacher's but for one that gives nothing."""
    teacher, data = teacher_of(), some_data()
    places = [f"A#{i}" for i in range(4)]
    same = student_of(teacher, Plan.of(teacher, "", dict.fromkeys(places, {"window": 16})))
    same.place("W#2").o_proj.weight.data.zero_()
    scores = RULES["kl"](teacher, request(student=same), data).scores
    assert scores["A#2"] == pytest.approx(divergence(teacher, same, data), abs=1e-12) and scores["A#2"] > 1e-3
    assert all(abs(scores[place]) <= 1e-12 for place in places if place != "A#2")


def test_a_window_that_sees_all_costs_nothing():
    teacher, data = teacher_of(), some_data()
    assert set(RULES["window"](teacher, request(window=16), data).scores.values()) == {0.0}
    assert all(score > 0 for score in RULES["window"](teacher, request(window=3), data).scores.values())


def replaced(model):
    """Which layer of four is no attention; 4: none."""
    kinds = [place for place in model.design.places() if place[0] in "AD"]
    return next((i for i, place in enumerate(kinds) if place[0] == "D"), 4)


def test_recall_and_halo_read_the_scores_that_they_are_given():
    retrieval, commonsense = [0.5, 0.9, 0.7, 0.9, 0.95], [0.4, 0.5, 0.45, 0.5, 0.5]
    score, other = (lambda model, table=table: table[replaced(model)] for table in (retrieval, commonsense))
    score.tokens = 100
    asked = RULES["recall"](teacher_of(), request(score=score), [])
    assert list(asked.scores.values()) == pytest.approx([0.45, 0.05, 0.25, 0.05]) and asked.tokens == 500
    found = RULES["halo"](teacher_of(), request(score=score, commonsense=other), [])
    assert list(found.scores.values()) == pytest.approx([0.4 / 0.1, 0.0, 0.2 / 0.05, 0.0])
    flat = RULES["halo"](teacher_of(), request(score=score, commonsense=lambda model: 0.5), [])
    assert flat.scores["A#0"] == MOST and flat.scores["A#1"] == 0
    with pytest.raises(ValueError, match="'recall' asks for a score"):
        RULES["recall"](teacher_of(), request(), [])


@pytest.mark.parametrize("rule", ["gates", "ga-s2"])
def test_learned_rules_find_the_layer_that_a_student_has_lost(rule):
    teacher, data = teacher_of(), some_data(5)
    places = [f"A#{i}" for i in range(4)]
    same = student_of(teacher, Plan.of(teacher, "", dict.fromkeys(places, {"window": 16})))
    same.place("W#2").o_proj.weight.data.zero_()
    before = [p.detach().clone() for p in (*teacher.parameters(), *same.parameters())]
    scores = RULES[rule](teacher, request(student=same, steps=10, rate=0.3 if rule == "gates" else 1e-6), data)
    assert choose(scores.scores, 1, rule) == ["A#2"] and scores.tokens > 0
    assert all(torch.equal(a, b) for a, b in zip(before, (*teacher.parameters(), *same.parameters()), strict=True))
    assert all(p.requires_grad for p in (*teacher.parameters(), *same.parameters()))
    if rule == "gates":
        assert sum(scores.scores.values()) == pytest.approx(2, abs=1e-5)


def test_shares_sum_to_the_budget_and_so_do_their_gradients():
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: at_budget(x, 2.0), logits)
    assert at_budget(logits, 2.0).sum().item() == pytest.approx(2.0, abs=1e-9)


def test_lists():
    teacher = teacher_of()
    uniform = RULES["uniform"](teacher, request(), [])
    assert choose(uniform.scores, 2, "uniform") == ["A#1", "A#3"] and uniform.tokens == 0
    listed = RULES["list"](teacher, request(listed=("A#0", "A#3")), [])
    assert choose(listed.scores, 2, "list") == ["A#0", "A#3"]
    with pytest.raises(ValueError, match="no place 'A#9'"):
        RULES["list"](teacher, request(listed=("A#0", "A#9")), [])
    with pytest.raises(ValueError, match="1 layers are listed, but 2 are to stay"):
        RULES["list"](teacher, request(listed=("A#0",)), [])
