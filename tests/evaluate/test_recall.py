"""Recall and needles: exact lengths, what only the text can answer, one who reads it and one who does not."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import plait
from plait.data import load_tokenizer, open_source, texts, train_bpe
from plait.engine.prefill import CHUNK
from plait.evaluate import likelihood
from plait.evaluate.haystack import ROOM, Filler
from plait.evaluate.recall import Kind, fitting, measure, needle_kinds, questions_of, recall_kinds

SIGMAS = 4  # a fair coin is further off once in 16,000 times; the seeds are fixed


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"In the year {n} nothing happened; people went on as before.\n" for n in range(100, 400)))
    return str(path)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, book):
    return load_tokenizer("bytes") if request.param == "bytes" else train_bpe(texts(open_source(book)), vocab=400)


KINDS = [Kind(400, 4), Kind(900, 16), Kind(200, 1, 0.0), Kind(333, 1, 50.0), Kind(200, 1, 100.0)]


def asked(tokenizer, book, kind, count=5, seed=0):
    return list(questions_of(kind, tokenizer, Filler(tokenizer, book, 8000), count, seed))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_exact_lengths_and_one_true_answer(tokenizer, book, kind):
    for hidden in asked(tokenizer, book, kind):
        assert len(hidden.context) + ROOM == kind.length
        text = tokenizer.decode(hidden.context)
        facts = dict(re.findall(r"\nThe code of (\w+) is (\d{4})\.\n", text))
        assert len(facts) == kind.pairs
        key = re.search(r"\nThe code of (\w+) is$", text)[1]
        assert hidden.values[hidden.right] == facts[key]
        assert len(set(hidden.values)) == len(hidden.values) == round(1 / kind.chance)
        assert set(facts.values()) <= set(hidden.values)
        for value, choice in zip(hidden.values, hidden.choices, strict=True):
            assert tokenizer.decode([*hidden.context, *choice]) == f"{text} {value}"
            assert len(choice) < ROOM
        rest = re.sub(r"\nThe code of \w+ is( \d{4}\.\n)?", "", text)
        assert rest[4:-4].strip() in Path(book).read_text()  # filler is the text's own, in one run


@pytest.mark.parametrize("depth", [0.0, 25.0, 50.0, 100.0])
def test_the_needle_lies_at_its_depth(tokenizer, book, depth):
    word = 12  # characters that the nearest beginning of a word may be away
    for hidden in asked(tokenizer, book, Kind(600, 1, depth)):
        text = tokenizer.decode(hidden.context)
        before, fact, after = re.split(r"(\nThe code of \w+ is \d{4}\.\n)", text)
        after = re.sub(r"\nThe code of \w+ is$", "", after)
        tokens = len(tokenizer.encode(before)), len(tokenizer.encode(after))
        assert tokens[0] / sum(tokens) == pytest.approx(depth / 100, abs=word / sum(tokens))


def test_equal_seeds_ask_equal_questions(tokenizer, book):
    kind = Kind(400, 4)
    assert asked(tokenizer, book, kind) == asked(tokenizer, book, kind)
    assert asked(tokenizer, book, kind)[:2] == asked(tokenizer, book, kind, count=2)
    assert asked(tokenizer, book, kind) != asked(tokenizer, book, kind, seed=1)


class Reader:
    """In a model's place: knows what it has read, as text, and goes on with what stands after the key asked for."""

    training, max_positions, device = False, None, torch.device("cpu")

    def __init__(self, tokenizer):
        self.tokenizer, self.design = tokenizer, SimpleNamespace(vocab=tokenizer.vocab)

    def next(self, read):
        text = self.tokenizer.decode(read)
        at = text.rindex("\nThe code of ")
        key = re.match(r"\nThe code of (\w+)", text[at:])[1]
        fact = re.search(rf"\nThe code of {key} is \d{{4}}\.\n", text[:at])[0]
        answer = self.tokenizer.encode(fact)
        done = self.tokenizer.encode(text[at:])
        return answer[len(done)] if len(done) < len(answer) else self.tokenizer.eos

    def head(self, hidden):
        return 9.0 * torch.nn.functional.one_hot(hidden[:, 0], self.tokenizer.vocab).float()


class Read(list):
    """What each row of a `Reader` has read."""

    def select(self, rows):
        return Read(self[row] for row in rows)


@pytest.fixture
def reader(tokenizer, monkeypatch):
    def prefill(model, prompts, room):
        return torch.tensor([[model.next(prompt)] for prompt in prompts]), Read(map(list, prompts))

    def advance(model, tokens, state, cuts=None):
        cuts = [0, tokens.shape[1]] if cuts is None else cuts.tolist()
        rows = (
            tokens.tolist()
            if len(tokens) > 1
            else [tokens[0, a:b].tolist() for a, b in zip(cuts, cuts[1:], strict=False)]
        )
        after = [
            [model.next(before + row[: n + 1]) for n in range(len(row))]
            for before, row in zip(state, rows, strict=True)
        ]
        state = Read(before + row for before, row in zip(state, rows, strict=True))
        hidden = torch.tensor(after) if len(tokens) > 1 else torch.tensor([[token for row in after for token in row]])
        return hidden[..., None], state

    for name, stand_in in (("prefill", prefill), ("advance", advance), ("check_finite", lambda hidden: None)):
        monkeypatch.setattr(likelihood, name, stand_in)
    model = Reader(tokenizer)
    model.head = type("Head", (), {"outputs": tokenizer.vocab, "__call__": lambda _, x: Reader.head(model, x)})()
    return model


def test_one_who_reads_is_always_right(reader, tokenizer, book):
    kinds = [*recall_kinds([900], [4, 16]), *needle_kinds([300], [0, 50, 100])]
    told = []
    found = measure(reader, tokenizer, kinds, text=book, questions=6, progress=lambda *n: told.append(n))
    assert [(cell.kind, cell.chosen, cell.written) for cell in found] == [(kind, 6, 6) for kind in kinds]
    assert told == [(n, 30) for n in range(1, 31)]


def test_one_who_has_learned_nothing_is_right_by_chance(book):
    tokenizer = load_tokenizer("bytes")
    torch.manual_seed(1)
    model = plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="D"))
    count = 200
    found = measure(model, tokenizer, [Kind(170, 4), Kind(120, 1, 50.0)], text=book, questions=count)
    for cell in found:
        chance = cell.kind.chance
        spread = math.sqrt(count * chance * (1 - chance))
        assert abs(cell.chosen - count * chance) <= SIGMAS * spread
        assert cell.written == 0


def test_what_does_not_fit_is_an_error(book, tmp_path):
    tokenizer = load_tokenizer("bytes")
    rope = plait.Attention(rope=plait.RoPE(max_positions=300))
    model = plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="A", layers={"A": rope}))
    assert fitting(model, (100, 300, 301)) == (100, 300)
    (cell,) = measure(model, tokenizer, [Kind(300, 2)], text=book, questions=1)  # to the last position
    assert cell.questions == 1
    short = tmp_path / "short.txt"
    short.write_text("Hardly a text.")
    for kinds, text, questions, what in (
        ([Kind(150, 5)], book, 1, "length 150: 5 facts, the question and 8 tokens for the answer take 1[67]. tokens"),
        ([Kind(301, 2)], book, 1, r"length 301 is longer than the model's positions go \(max_positions 300\)"),
        ([Kind(200, 1, 0.0)], str(short), 1, "14 tokens of text, and 1.. are needed between the facts"),
        ([Kind(200, 2)], book, 0, "questions must be at least 1"),
    ):
        with pytest.raises(ValueError, match=what):
            measure(model, tokenizer, kinds, text=text, questions=questions)
    with pytest.raises(ValueError, match="pairs must be at least 2, got 1"):
        recall_kinds([100], [4, 1])
    with pytest.raises(ValueError, match="from 0 to 100, got 101"):
        needle_kinds([100], [0, 101])


def test_more_questions_than_one_reading_holds(book):
    """The groups that are read together change nothing."""
    tokenizer = load_tokenizer("bytes")
    torch.manual_seed(0)
    model = plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="D A"), dtype=torch.float64)
    kind, count = Kind(500, 4), 20
    assert count * kind.length > max(CHUNK, likelihood.TOKENS)
    (found,) = measure(model, tokenizer, [kind], text=book, questions=count)
    chosen = 0
    for hidden in questions_of(kind, tokenizer, Filler(tokenizer, book, 8 * 500), count, 0):
        scores = []
        for choice in hidden.choices:
            with torch.no_grad():
                ln_p = model(torch.tensor([[*hidden.context, *choice]]))[0][0].log_softmax(-1)
            at = range(len(hidden.context) - 1, len(hidden.context) + len(choice) - 1)
            scores.append(ln_p[list(at), choice].sum().item())
        chosen += scores.index(max(scores)) == hidden.right
    assert found.chosen == chosen
