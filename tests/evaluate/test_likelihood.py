"""Continuations scored from a shared state equal whole sequences read at once, whatever the groups and chunks."""

from types import SimpleNamespace

import pytest
import torch

import plait
from plait.engine import generate_tokens
from plait.engine.prefill import CHUNK
from plait.evaluate import likelihood
from plait.evaluate.likelihood import Question, answers, loglikelihoods

LAYERS = {"F": plait.SwiGLU(hidden=32), "W": plait.Attention(heads=2, window=9)}
DESIGN = plait.ModelConfig(vocab=61, dim=64, pattern="[D|A]F W M", layers=LAYERS)
EQUAL = {"abs": 1e-9}  # float64: the sums of a few dozen logarithms in another order


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return plait.build(DESIGN, dtype=torch.float64)


def ids(seed, length):
    return torch.randint(61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


QUESTIONS = [
    Question(ids(0, 30), [ids(1, 4), ids(2, 1), ids(3, 17)]),
    Question(ids(4, 1), [ids(5, 40)]),
    Question(ids(6, 55), [ids(7, 1), ids(8, 2)]),
    Question(ids(9, 30), []),
]


@torch.no_grad()
def by_hand(model, context, choice):
    """All tokens in one call without a state."""
    logits, _ = model(torch.tensor([[*context, *choice]]))
    ln_p = logits[0, :-1].log_softmax(-1)[-len(choice) :]
    scores = ln_p.gather(-1, torch.tensor(choice)[:, None])
    return scores.sum().item(), ln_p.argmax(-1).tolist() == choice


@pytest.mark.parametrize("rows", [1, 3, None])
@pytest.mark.parametrize("chunk", [5, 2048])
@pytest.mark.parametrize("slice_", [61, 2**25])
def test_chunked_is_whole(model, monkeypatch, rows, chunk, slice_):
    monkeypatch.setattr(likelihood, "CHUNK", chunk)
    monkeypatch.setattr("plait.engine.prefill.CHUNK", chunk)
    monkeypatch.setattr(likelihood, "SLICE", slice_)
    monkeypatch.setattr(likelihood, "TOKENS", 40)
    got = list(answers(model, QUESTIONS, rows=rows))
    for question, answer in zip(QUESTIONS, got, strict=True):
        for choice, scored in zip(question.choices, answer.scores, strict=True):
            total, greedy = by_hand(model, question.context, choice)
            assert scored.loglikelihood == pytest.approx(total, **EQUAL)
            assert scored.greedy == greedy
        assert answer.written == []


def test_a_gpu_holds_states_by_their_bytes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 2**33))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**28)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**27)
    for pattern, grows in (("AF", True), ("MF", False)):
        design = plait.ModelConfig(vocab=31, dim=64, pattern=pattern)
        there = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, design=design)
        size, most = likelihood.held(there)
        state = plait.build(design, dtype=torch.bfloat16).init_state(1, 500)
        assert size(500) == state.nbytes
        assert (size(1000) > size(500)) == grows
        assert most == (2**29 + 2**27) // 8


def test_what_is_written_is_what_generation_gives(model):
    contexts = [question.context for question in QUESTIONS]
    got = [answer.written for answer in answers(model, QUESTIONS, write=6)]
    assert got == generate_tokens(model, contexts, max_tokens=6)
    asked = [Question(context, [written]) for context, written in zip(contexts, got, strict=True)]
    assert all(answer.scores[0].greedy for answer in answers(model, asked))
    few = answers(model, QUESTIONS, write=6, vocab=9)
    assert max(token for answer in few for token in answer.written) < 9


def test_neighbours_with_equal_contexts_are_read_once(model):
    pairs = [(question.context, choice, "x") for question in QUESTIONS for choice in question.choices]
    read = []
    model.embed.register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    got = list(loglikelihoods(model, pairs))
    expected = [by_hand(model, context, choice) for context, choice, _ in pairs]
    assert [scored.loglikelihood for scored in got] == pytest.approx([total for total, _ in expected], **EQUAL)
    once = sum(len(question.context) for question in QUESTIONS[:3])
    assert sum(read[: -len(pairs)]) == once + sum(len(choice) - 1 for _, choice, _ in pairs)


def test_training_mode_comes_back(model):
    model.train()
    list(answers(model, QUESTIONS))
    assert model.training
    model.eval()


def test_what_cannot_be_scored():
    rope = plait.Attention(rope=plait.RoPE(max_positions=32))
    limited = plait.build(plait.ModelConfig(vocab=61, dim=64, pattern="A", layers={"A": rope}))
    assert len(list(answers(limited, [Question(ids(0, 30), [ids(1, 3)])], write=3))) == 1
    for question, what in (
        (Question(ids(0, 30), [ids(1, 4)], "line 3"), "line 3: 33 tokens are longer"),
        (Question([], [ids(1, 4)], "line 4"), "line 4: the context has no tokens"),
        (Question(ids(0, 3), [ids(1, 4), []], "line 5"), "line 5: a continuation has no tokens"),
    ):
        with pytest.raises(ValueError, match=what):
            list(answers(limited, [question]))
    with pytest.raises(ValueError, match="33 tokens are longer"):
        list(answers(limited, [Question(ids(0, 30), [])], write=4))


def test_a_long_text_is_never_read_or_scored_in_one_piece():
    """No call has more tokens, and no logits more positions, than a chunk."""
    recurrent = plait.build(plait.ModelConfig(vocab=61, dim=64, pattern="D"))
    calls, logits = [], []
    recurrent.embed.register_forward_pre_hook(lambda _, given: calls.append(given[0].numel()))
    head = type(recurrent.head).__call__

    def watched(self, hidden):
        logits.append(len(hidden))
        return head(self, hidden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(recurrent.head), "__call__", watched)
        list(answers(recurrent, [Question(ids(0, 2 * CHUNK + 1), [ids(1, 2 * CHUNK + 1)])]))
    assert max(calls) == CHUNK
    assert max(logits) == CHUNK
