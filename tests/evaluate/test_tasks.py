"""lm-eval's sets: prompts as lm-eval 0.4.13 makes them, its formulas against numbers worked out by hand, and errors that name
file, record and field."""

import json
import math
from pathlib import Path

import pytest
import torch

import plait
from plait.data import DataError, load_tokenizer
from plait.evaluate.likelihood import Scored
from plait.evaluate.tasks import (
    TASKS,
    Example,
    encode_pair,
    find_file,
    mean_and_error,
    perplexity,
    read_task,
    run_task,
    score_example,
)

# (file, records or text, first (context, continuation) pairs, gold), each written out from lm-eval's task files by hand
SAMPLES = {
    "arc_easy": (
        "arc_easy.jsonl",
        [{"question": "Why?", "choices": {"text": ["so", "not so"], "label": ["1", "2"]}, "answerKey": "2"}],
        [("Question: Why?\nAnswer:", " so"), ("Question: Why?\nAnswer:", " not so")],
        1,
    ),
    "arc_challenge": (
        "arc_challenge_test.jsonl",
        [{"query": "Question: Why?", "choices": ["so", "not so"], "gold": 0}],
        [("Question: Why?\nAnswer:", " so"), ("Question: Why?\nAnswer:", " not so")],
        0,
    ),
    "hellaswag": (
        "hellaswag.jsonl",
        [
            {
                "activity_label": "Baking",
                "ctx_a": "[header] How to bake [title] Mix it.  Heat.",
                "ctx_b": "the Cook",
                "endings": ["[step] waits.", " runs", "[a] [b]sings", "eats [substeps] all."],
                "label": "3",
            }
        ],
        [
            ("Baking: How to bake. Mix it. Heat. The cook", "  waits."),  # what its `preprocess` gives, run once
            ("Baking: How to bake. Mix it. Heat. The cook", " runs"),
            ("Baking: How to bake. Mix it. Heat. The cook", "  sings"),
            ("Baking: How to bake. Mix it. Heat. The cook", " eats all."),
        ],
        3,
    ),
    "piqa": (
        "piqa_valid.jsonl",
        [{"goal": "dry it", "sol1": "wait", "sol2": "stir", "label": 1}],
        [("Question: dry it\nAnswer:", " wait"), ("Question: dry it\nAnswer:", " stir")],
        1,
    ),
    "winogrande": (
        "winogrande.jsonl",
        [{"sentence": "Ann met Bea because _ was there. ", "option1": "Ann", "option2": "Bea", "answer": "2"}],
        [("Ann met Bea because Ann", " was there."), ("Ann met Bea because Bea", " was there.")],
        1,
    ),
    "lambada_openai": ("lambada.jsonl", [{"text": "One two\nthree four"}], [("One two\nthree", " four")], 0),
}


@pytest.mark.parametrize("task", SAMPLES)
def test_prompts(task, tmp_path):
    name, records, pairs, gold = SAMPLES[task]
    (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    path = find_file(task, tmp_path)
    ((where, example),) = read_task(task, path)
    assert where == f"{tmp_path / name}, line 1"
    assert example.pairs == pairs
    assert example.gold == gold


def test_the_other_forms_of_records_ask_the_same(tmp_path):
    for task, records in (
        ("piqa", [{"query": "Question: dry it\n", "choices": ["wait", "stir"], "gold": 1}]),
        ("lambada_openai", [{"context": "One two\nthree", "continuation": "four"}]),
        (
            "winogrande",
            [
                {
                    "context_options": ["Ann met Bea because Ann", "Ann met Bea because Bea"],
                    "continuation": "was there.",
                    "gold": 1,
                }
            ],
        ),
    ):
        path = tmp_path / f"{task}.jsonl"
        path.write_text("\n" + json.dumps(records[0]))
        ((where, example),) = read_task(task, path)
        assert where.endswith("line 2")
        assert (example.pairs, example.gold) == SAMPLES[task][2:]


def test_hellaswag_of_six_lines(tmp_path):
    (tmp_path / "hellaswag_val.txt").write_text(
        "Baking: Heat. the cook\n2\nwaits.\nruns\nsings\neats all.\n" * 2 + "\n"
    )
    path = find_file("hellaswag", tmp_path)
    (_, first), (where, second) = read_task("hellaswag", path)
    assert first == second
    assert where.endswith("line 7")
    assert (first.pairs[2], first.gold) == (("Baking: Heat. the cook", " sings"), 2)
    path.write_text("Baking: Heat. the cook\n2\nwaits.\n")
    with pytest.raises(DataError, match="3 lines; expected six a question"):
        list(read_task("hellaswag", path))


def scored(*values):
    return [Scored(value, False) for value in values]


def test_formulas_against_hand_computed_numbers():
    example = Example([("c", " abcd"), ("c", " ab"), ("c", " é")], ["abcd", "ab", "é"], 0)
    # -4 / 4, -3 / 2, -2 / 1: the last is the likeliest, the first by the character, of which "é" is one
    assert score_example(example, scored(-4.0, -3.0, -2.0)) == {"acc": 0.0, "acc_norm": 1.0, "loglikelihood": -4.0}
    assert score_example(example, scored(-2.0, -2.0, -9.0))["acc"] == 1.0  # the first of equals
    alone = Example([("c", " d")], ["d"], 0)
    assert score_example(alone, [Scored(-1.5, True)]) == {"acc": 1.0, "loglikelihood": -1.5}
    assert score_example(alone, [Scored(-0.1, False)])["acc"] == 0.0
    assert mean_and_error([1.0, 0.0, 0.0, 1.0, 1.0]) == (0.6, pytest.approx(math.sqrt(0.3 / 5)))
    assert mean_and_error([1.0]) == (1.0, None)
    assert perplexity([-1.0, -3.0]) == pytest.approx(math.exp(2))
    assert perplexity([-1e6]) == math.inf


def test_pairs_are_encoded_as_lm_eval_encodes_them():
    tokenizer = load_tokenizer("bytes")
    assert encode_pair(tokenizer, "ab ", "c") == ([97, 98], [32, 99])
    assert encode_pair(tokenizer, "ab", " c") == ([97, 98], [32, 99])
    assert encode_pair(tokenizer, "", "c") == ([256], [99])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="D A"), dtype=torch.float64)


@pytest.mark.parametrize("task", SAMPLES)
def test_a_task_from_the_file_to_its_metrics(task, model, tmp_path):
    name, records, pairs, gold = SAMPLES[task]
    (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records * 3))
    tokenizer, told = load_tokenizer("bytes"), []
    got = run_task(model, tokenizer, task, tmp_path, limit=2, progress=lambda *n: told.append(n))
    assert (got.questions, told) == (2, [(1, 2), (2, 2)])
    assert tuple(got.metrics) == TASKS[task].metrics
    sums, greedy = [], []
    for context, continuation in pairs:
        before, after = tokenizer.encode(context), tokenizer.encode(continuation)
        with torch.no_grad():
            ln_p = model(torch.tensor([before + after]))[0][0, len(before) - 1 : -1].log_softmax(-1)
        sums.append(ln_p[range(len(after)), after].sum().item())
        greedy.append(ln_p.argmax(-1).tolist() == after)
    if task == "lambada_openai":
        assert got.metrics == {"acc": float(greedy[0]), "perplexity": pytest.approx(math.exp(-sums[0]))}
    else:
        assert got.metrics["acc"] == float(sums.index(max(sums)) == gold)
    assert got.errors["acc"] == 0.0  # the same question twice


WRONG = {
    "no field 'sol2'; there are 'sol1'": ("piqa", {"sol1": "a"}),
    "field 'label' is 2; expected 0 to 1": ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 2}),
    "field 'label' holds True; expected a whole number": (
        "piqa",
        {"goal": "g", "sol1": "a", "sol2": "b", "label": True},
    ),
    "field 'sol1' holds 3; expected a text": ("piqa", {"goal": "g", "sol1": 3}),
    "field 'answer' is '0'; expected 1 to 2": (
        "winogrande",
        {"sentence": "_ is", "option1": "a", "option2": "b", "answer": "0"},
    ),
    "field 'sentence' has no '_'": ("winogrande", {"sentence": "is", "option1": "a", "option2": "b", "answer": "1"}),
    "field 'answerKey' is 'E'; expected one of A, B": (
        "arc_easy",
        {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "E"},
    ),
    "field 'choices': no field 'text'; there are none": ("arc_easy", {"question": "q", "choices": {}}),
    "field 'choices' holds .*; expected a list of texts": ("hellaswag", {"query": "q", "choices": ["a", ""]}),
}


@pytest.mark.parametrize("what", WRONG)
def test_errors_name_file_record_and_field(what, tmp_path):
    task, record = WRONG[what]
    path = tmp_path / f"{TASKS[task].files}.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=rf"{path}, line 1[:,] {what}"):
        list(read_task(task, path))


def test_finding_files(tmp_path):
    with pytest.raises(ValueError, match="unknown task lm:arc_esay; did you mean 'arc_easy'"):
        find_file("arc_esay", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; expected one with the files of lm:piqa"):
        find_file("piqa", tmp_path / "nowhere")
    (tmp_path / "piqa.jsonl.bz2").touch()
    with pytest.raises(FileNotFoundError, match=r"no file of lm:piqa; expected piqa\*.jsonl \(piqa.jsonl.bz2 is there"):
        find_file("piqa", tmp_path)
    (tmp_path / "piqa.jsonl").touch()
    assert find_file("piqa", tmp_path) == tmp_path / "piqa.jsonl"
    (tmp_path / "piqa_test.jsonl").touch()
    with pytest.raises(ValueError, match=r"lm:piqa has piqa.jsonl and piqa_test.jsonl; leave one there"):
        find_file("piqa", tmp_path)


def test_a_file_without_records(model, tmp_path):
    Path(tmp_path, "piqa.jsonl").touch()
    with pytest.raises(DataError, match="piqa.jsonl: no records"):
        run_task(model, load_tokenizer("bytes"), "piqa", tmp_path)
