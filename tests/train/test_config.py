"""A run as data: what is read is what is written, and what is wrong is said in one line."""

import math
import subprocess
import sys
from typing import get_args

import msgspec
import pytest
import yaml

from plait.data.tokenizer_hf import LARGEST
from plait.train import DataConfig, RunConfig, load_run
from plait.train.config import FIXED, FREE, resolve_design, to_yaml
from plait.train.optim import scale

MINIMAL = {"design": "(DF)3 AF"}


@pytest.mark.parametrize(
    "data",
    [
        MINIMAL,
        {"design": {"dim": 64, "pattern": "[M|A]F", "layers": {"A": {"kind": "attention", "kv_heads": 1}}}},
        {"design": "tiny", "data": {"tokenizer": {"bpe": 4096}}, "betas": [0.8, 0.9], "clip": None, "resume": True},
    ],
)
def test_yaml_in_is_yaml_out(data):
    run = RunConfig.from_dict(data)
    text = to_yaml(run)
    assert RunConfig.from_dict(yaml.safe_load(text)) == run
    assert to_yaml(RunConfig.from_dict(yaml.safe_load(text))) == text


def test_every_key_is_spelled_out_in_what_is_written():
    written = RunConfig.from_dict(MINIMAL).to_dict()
    assert set(written) == set(RunConfig.__struct_fields__)
    assert written["data"]["length"] == 512


def test_every_key_is_documented():
    for name in RunConfig.__struct_fields__:
        assert name in RunConfig.__doc__
    assert set(FIXED) | set(FREE) <= set(RunConfig.__struct_fields__)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stepz": 3}, "did you mean 'steps'?"),
        ({"data": "book.txt"}, "data: expected a mapping such as {source: book.txt}, got text"),
        ({"source": "book.txt"}, "run: unknown key 'source'; did you mean 'data.source'?"),
        ({"data": {"tokenizer": {"bpe": LARGEST + 1}}}, "at most 1,048,576"),
        ({"data": {"lenght": 3}}, "data: unknown key 'lenght'; did you mean 'length'?"),
        ({"data": {"heldout": 1.5}}, "data.heldout must be between 0 and 1, got 1.5"),
        ({"data": {"tokenizer": {"bpe": 100}}}, "at least 257"),
        ({"data": {"tokenizer": {"bpee": 300}}}, "did you mean 'bpe'?"),
        (
            {"data": {"tokenizer": {"bpe:300": None}}},
            "data.tokenizer: expected a whole number for each key, got {'bpe:300'",
        ),
        ({"betas": [0.9, "x"]}, "run.betas[1]: expected a number, got 'x'"),
        ({"betas": [0.9]}, "run.betas: expected a list of length 2, got [0.9]"),
        ({"rates": {"A": "x"}}, "run.rates: expected a number for each key, got {'A': 'x'}"),
        ({"rates": {1: 2}}, "run.rates: expected text as each key, got {1: 2}"),
        ({"optimizer": "adam"}, "did you mean 'adamw'?"),
        ({"schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"precision": "float16"}, "did you mean 'bfloat16'?"),
        (
            {"activation_checkpointing": "chep"},
            "run.activation_checkpointing: 'chep' does not exist; did you mean 'cheap'?",
        ),
        ({"resume": "yes"}, "run.resume: 'yes' does not exist; known: auto, false, true"),
        ({"steps": 0}, "steps must be above 0"),
        ({"lr": "fast"}, "lr: expected a number, got 'fast'"),
        ({"batch": 6, "accumulate": 4}, "4 does not divide batch 6"),
        ({"warmup": 2000}, "do not fit into steps 1000"),
        ({"schedule": "wsd", "warmup": 0.5, "decay": 0.6}, "do not fit"),
        ({"betas": [0.9, 1.0]}, "betas must be in [0, 1)"),
        ({"lr_end": 2.0}, "between 0 and 1"),
        ({"design": 3}, "expected a pattern"),
    ],
)
def test_a_wrong_value_is_one_line(change, said):
    with pytest.raises(ValueError, match=".") as caught:
        RunConfig.from_dict(MINIMAL | change)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


NUMBERS = [
    (config, field.name)
    for config in (RunConfig, DataConfig)
    for field in msgspec.structs.fields(config)
    if any(kind in (int, float) for kind in (field.type, *get_args(field.type)))
]


@pytest.mark.parametrize(("config", "name"), NUMBERS, ids=[name for _, name in NUMBERS])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, -1e-9, True, "1", -(2**64)])
def test_no_number_takes_what_is_none(config, name, value):
    fields = {"design": "AF"} if config is RunConfig else {}
    fields[name] = [value, 0.9] if name == "betas" else value
    with pytest.raises(ValueError, match=name) as caught:
        config(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": seed} for seed in (2**63, 2**64, 10**30)),
        *({"lr": lr} for lr in (0, 1e-300, 1e6, 1e300)),
        *({"clip": clip} for clip in (0, 1e-300, 1e300)),
        *({name: amount} for name in ("warmup", "decay") for amount in (1.5, 99.9)),
        {"warmup": 1e300},
        {"weight_decay": 1e9},
        {"betas": [1e300, 0.9]},
        {"steps": 10**30},
        {"batch": 2**22},
        {"data": {"length": 2**31}},
        {"data": {"source": ""}},
        {"data": {"tokenizer": {"bpe": 10**12}}},
        {"data": {"tokenizer": {}}},
        {"folder": ""},
        {"sample_prompt": ""},
        {"sample_prompt": "a\ud800"},
    ],
    ids=str,
)
def test_no_number_is_taken_that_no_run_can_have(change):
    inner = change.get("data", change)
    with pytest.raises(ValueError, match=next(iter(inner))) as caught:
        RunConfig.from_dict(MINIMAL | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("amount", [0, 1e-300, 0.3, 0.5, 0.999999, 1, 3.0])
def test_a_run_that_is_taken_has_a_schedule_to_its_end(schedule, steps, amount):
    try:
        run = RunConfig(design="AF", steps=steps, schedule=schedule, warmup=amount, decay=amount)
    except ValueError as error:
        assert "do not fit into steps" in str(error)  # noqa: PT017  (either is right)
        return
    assert all(0 < scale(step, run) <= 1 for step in range(1, steps + 1))


def test_a_run_without_a_design_says_so():
    with pytest.raises(ValueError, match="'design' is missing"):
        RunConfig.from_dict({"steps": 3})


def test_a_file_names_its_folder_and_overrides_reach_in(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("design: {dim: 64, pattern: AF}\nlr: 3e-4\nsteps: 50\n")
    run = load_run(path, **{"steps": 70, "data.length": 32, "design.dim": 128})
    assert (run.folder, run.lr, run.steps, run.data.length) == ("runs/small", 3e-4, 70, 32)
    assert run.design == {"dim": 128, "pattern": "AF"}
    with pytest.raises(ValueError, match="small.yaml: run: unknown key 'step'; did you mean 'steps'"):
        load_run(path, step=3)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_run(tmp_path / "smal.yaml")


def test_a_run_folder_that_was_moved_is_its_own_folder(tmp_path):
    (tmp_path / "run.yaml").write_text(to_yaml(RunConfig(design="AF", folder="runs/elsewhere")))
    assert load_run(tmp_path).folder == str(tmp_path)


@pytest.mark.parametrize("where", ["", "deep"])
def test_a_stored_run_s_paths_begin_where_it_was_made(tmp_path, monkeypatch, where):
    home = tmp_path / where
    (home / "runs" / "x").mkdir(parents=True)
    (home / "tok").mkdir()
    data = {"source": "text/*.txt", "tokenizer": "tok", "cache": "runs/cache"}
    (home / "runs" / "x" / "run.yaml").write_text(to_yaml(RunConfig(design="AF", folder="runs/x", data=data)))
    monkeypatch.chdir(home)
    assert load_run("runs/x").data == DataConfig(**data)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = load_run(home / "runs" / "x").data
    assert found.source == str(home / "text" / "*.txt")
    assert (found.tokenizer, found.cache) == (str(home / "tok"), str(home / "runs" / "cache"))
    plain = RunConfig(design="AF", folder="runs/x", data={"source": "hf:a/b", "tokenizer": "someone/tok"})
    (home / "runs" / "x" / "run.yaml").write_text(to_yaml(plain))
    kept = load_run(home / "runs" / "x").data
    assert (kept.source, kept.tokenizer) == ("hf:a/b", "someone/tok")


def test_the_vocabulary_is_the_tokenizers_where_the_design_leaves_it_out(tmp_path):
    assert resolve_design("AF", 257).vocab == 257
    assert resolve_design("small-hybrid", 4096).vocab == 4096
    assert resolve_design({"dim": 64, "pattern": "AF"}, 300).vocab == 300
    assert resolve_design({"dim": 64, "pattern": "AF", "vocab": 320}, 300).vocab == 320
    with pytest.raises(ValueError, match="design.vocab 256 is smaller than the tokenizer's 257"):
        resolve_design({"dim": 64, "pattern": "AF", "vocab": 256}, 257)
    file = tmp_path / "design.yaml"
    file.write_text("{dim: 64, pattern: AF, vocab: 400}")
    assert resolve_design(str(file), 257).vocab == 400


def test_reading_a_run_needs_no_torch():
    code = "import sys, plait.train as t; t.load_run; t.latest; t.Interrupted; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_text_is_no_run(tmp_path):
    (tmp_path / "book.txt").write_text("Chapter 1: `On` walking\n---\n: and so on", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"book\.txt: cannot be read as YAML: .*; text to train on is data\.source=.*book\.txt"
    ) as caught:
        load_run(tmp_path / "book.txt")
    assert "\n" not in str(caught.value)
