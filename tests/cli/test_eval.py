"""`plait eval` beyond perplexity: tables, the JSON line, and wrong input, which is found before a model is loaded."""

import json

import pytest

CPU = ("--device", "cpu")
SMALL = ("--lengths", "150,200", "--questions", "2", *CPU)


@pytest.fixture
def sets(tmp_path):
    record = {"goal": "Dry a wet floor.", "sol1": "Use a mop.", "sol2": "Use a hose.", "label": 0}
    (tmp_path / "piqa.jsonl").write_text((json.dumps(record) + "\n") * 3)
    return str(tmp_path)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "book.txt").write_text("Once there was a number, and nothing came of it.\n" * 100)
    return str(tmp_path / "book.txt")


def test_all_measures_in_one_line(plait, run_folder, sets, text):
    asked = ("ppl", "recall", "needle", "lm:piqa", "--text", text, "--data", sets, "--pairs", "2", "--depths", "0,50")
    ran = plait("eval", str(run_folder), *asked, *SMALL, "--json")
    assert ran.code == 0, ran.err
    data = ran.json
    assert data["tokens"] > 0  # perplexity's are the line's own
    assert [(kind["length"], kind["pairs"]) for kind in data["recall"]["kinds"]] == [(150, 2), (200, 2)]
    assert [(kind["length"], kind["depth"]) for kind in data["needle"]["kinds"]] == [
        *((150, 0.0), (150, 50.0)),
        *((200, 0.0), (200, 50.0)),
    ]
    assert data["recall"]["questions"] == 4
    assert data["needle"]["written"] == 0
    assert data["lm"]["piqa"]["questions"] == 2
    assert {"acc", "acc_stderr", "acc_norm", "file"} <= data["lm"]["piqa"].keys()


def test_tables(plait, run_folder, text):
    ran = plait("eval", str(run_folder), "recall", "needle", "--text", text, "--pairs", "2", "--depths", "25", *SMALL)
    assert ran.code == 0
    assert "ppl" not in ran.out
    for line in (
        "recall, % written right by the model",
        "2 pairs",
        "by chance",
        "depth 25 %",
        "of 4 questions, seed 0",
    ):
        assert line in ran.out


def test_equal_seeds_give_equal_lines(plait, run_folder, text):
    asked = ("eval", str(run_folder), "recall", "--text", text, "--pairs", "2", *SMALL, "--json")
    assert plait(*asked).out == plait(*asked).out


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["recal"], "unknown measure 'recal'; did you mean 'recall'?"),
        (["lm:piqa"], "lm:piqa is read from files of yours: give their folder by --data"),
        (["lm:pika", "--data", "."], "unknown task lm:pika; did you mean 'piqa'?"),
        (["lm:piqa", "--data", "nowhere"], "nowhere: no such folder; expected one with the files of lm:piqa"),
        (["recall", "--lengths", "512;1024"], "--lengths '512;1024': expected numbers with commas between them"),
        (["recall", "--lengths", "0"], "--lengths '0': expected numbers above 0"),
        (["recall", "--context", "64"], "--context changes nothing here: it is for ppl"),
        (["needle", "--tokens", "64"], "--tokens changes nothing here: it is for ppl"),
        (["needle", "--data", "."], "--data changes nothing here: it is for lm:TASK"),
        (["ppl", "--questions", "4"], "--questions changes nothing here: it is for recall and needle and lm:TASK"),
        (["ppl", "--seed", "0"], "--seed changes nothing here: it is for recall and needle"),
        (["recall", "--depths", "5"], "--depths changes nothing here: it is for needle"),
        (["ppl", "--lengths", "512"], "--lengths changes nothing here: it is for recall and needle"),
        (["recall", "--questions", "0"], "--questions must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_found_first(plait, arguments, what):
    ran = plait("eval", "no-such-model", *arguments)
    assert ran.code == 1
    assert what in ran.err


def test_what_does_not_fit_is_one_line(plait, run_folder, text):
    ran = plait("eval", str(run_folder), "recall", "--text", text, "--lengths", "100", "--pairs", "9", *CPU)
    assert ran.code == 1
    assert ran.err.startswith("error: length 100: 9 facts, the question and 8 tokens for the answer take")
