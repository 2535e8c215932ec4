import subprocess

import pytest

from plait.cli.changes import changed_design, read_changes
from plait.cli.command import shell
from plait.design import ModelConfig
from plait.train import RunConfig


def run(*arguments):
    return read_changes(arguments, RunConfig, {"design": ModelConfig})


def test_values_are_yaml_where_no_text_is_taken():
    assert run(
        "steps=0040", "lr=3e-4", "compile=true", "betas=[0.8, 0.9]", "clip=null", "design.layers.A.rope=null"
    ) == {
        **{"steps": 40, "lr": 3e-4, "compile": True, "betas": [0.8, 0.9], "clip": None},
        "design.layers.A.rope": None,
    }


@pytest.mark.parametrize("key", ["sample_prompt", "folder", "data.source", "data.cache", "design.pattern"])
@pytest.mark.parametrize(
    "text", ["", " x ", "# x", "7", "1e3", "null", "true", "[M|A]F", "'x'", "a: b", "x=y", "- x", "~", "\t"]
)
def test_text_is_taken_as_it_stands(key, text):
    assert run(f"{key}={text}") == {key: text}


def test_a_field_of_text_or_more_takes_both():
    assert run("data.tokenizer={bpe: 300}", "resume=auto", "design=[M|A]F") == {
        **{"data.tokenizer": {"bpe": 300}, "resume": "auto", "design": "[M|A]F"}
    }
    assert run("design=null", "start=null") == {"design": None, "start": None}
    assert run("data.tokenizer=2024", "resume=# x") == {"data.tokenizer": "2024", "resume": "# x"}
    assert run("resume=true", "design={dim: 64}") == {"resume": True, "design": {"dim": 64}}


@pytest.mark.parametrize(("text", "number"), [("2e3", 2000), ("16.0", 16), ("007", 7)])
def test_whole_numbers_may_be_spelled_as_others(text, number):
    steps = RunConfig.from_dict({"design": "AF", **run(f"steps={text}")}).steps
    assert (steps, type(steps)) == (number, int)
    sized = {"dim": 64, "pattern": "AF", **read_changes([f"vocab={text}"], ModelConfig)}
    assert ModelConfig.from_dict(sized).vocab == number


@pytest.mark.parametrize("text", ["2.5", "1_0", "1:30", "yes", "ten", "", "[3]", "true", ".nan", "1e999"])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(ValueError, match=r"run\.steps: expected a (whole|finite) number, got"):
        RunConfig.from_dict({"design": "AF", **run(f"steps={text}")})


@pytest.mark.parametrize("argument", ["dim", "=3", "a b=3", "3x=1", "a..b=1", "at.A#.heads=1", "at.#0.heads=1"])
def test_what_is_no_change_is_refused(argument):
    with pytest.raises(ValueError, match="expected key=value"):
        run(argument)


def test_a_key_reaches_into_one_place():
    design = ModelConfig(vocab=61, dim=64, pattern="(AF)2", at={"A#1": {"heads": 4}})
    assert changed_design("(AF)2", ["vocab=61", "dim=64", "at.A#1.heads=4"]) == design


@pytest.mark.parametrize("word", ["(AF)2", 'at={"A#0": {heads: 1}}', "at.A#0.heads=1", "it's $HOME", "a\\b c", "plain"])
def test_words_shown_are_those_that_a_shell_reads(word):
    shown = subprocess.run(["sh", "-c", f"printf %s {shell(word)}"], capture_output=True, text=True, check=True)
    assert shown.stdout == word


def test_a_key_given_twice_is_refused():
    with pytest.raises(ValueError, match="lr is given twice"):
        run("lr=1", "steps=3", "lr=2")
