"""A small study, end to end."""

import json
import math
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from plait.run_folder import step_of
from plait.study import Study, run_study
from plait.study.pool import Board, finished, last_step
from plait.study.results import write_results
from plait.train import Interrupted, TrainingStopped, latest
from plait.train.lock import alone_in

QUIET = Console(quiet=True)


def small(text, folder, **changes) -> Study:
    data = {"source": str(text), "tokenizer": {"bpe": 300}, "length": 32, "cache": f"{folder}/cache"}
    training = {"batch": 2, "device": "cpu", "eval_every": 2, "eval_tokens": 128, "sample_every": 0, "save_every": 0}
    settings = {
        "patterns": {"attention": "(AF)2", "both": "[D|A]F"},
        "folder": str(folder),
        "dim": 64,
        "parameters": 160_000,
        "tokens": 260,
        "data": data,
        "training": training,
        "decode_contexts": (4, 64),
        "state_contexts": (64, 1_024),
        "sample_tokens": 4,
    }
    return Study(**(settings | changes))


@pytest.fixture(scope="module")
def done(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, run_study(small(text, folder), command="a test", console=QUIET)


def test_every_model_reads_the_same_tokens(done):
    _, data = done
    assert [model["name"] for model in data["models"]] == ["attention", "both"]
    for model in data["models"]:
        assert model["train_tokens"] == 256
        assert [point[0] for point in model["losses"]] == [64, 128, 192, 256]
        assert [point[0] for point in model["heldout"]] == [128, 256]


def test_what_is_measured_makes_sense(done):
    for model in done[1]["models"]:
        assert abs(model["parameters"] / 160_000 - 1) <= 0.03
        assert 0 < model["bits_per_byte"] < 10
        assert set(model["decode_ms"]) == {"4", "64"}
        assert all(value > 0 for value in model["decode_ms"].values())
        assert model["state_bytes"]["1024"] > model["state_bytes"]["64"] > 0
        assert model["train_tokens_per_s"] > 0


def test_results_and_report_are_written(done):
    folder, data = done
    assert json.loads((folder / "results.json").read_text()) == data
    report = (folder / "report.html").read_text()
    assert "a test" in report
    assert not list(folder.glob(".*"))


def test_again_nothing_is_trained_twice(done, text):
    folder, before = done
    weights = folder / "both" / "checkpoints" / "step-000004" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    after = run_study(small(text, folder), console=QUIET)
    assert weights.stat().st_mtime_ns == written
    for name in ("bits_per_byte", "losses", "sample", "train_seconds"):
        assert [model[name] for model in after["models"]] == [model[name] for model in before["models"]]


def test_a_folder_holds_one_study_at_a_time(text, tmp_path):
    """One that is going on is left alone, `fresh` starts over, another one takes its place; what is not its own stays."""
    study = small(text, tmp_path, patterns={"both": "[D|A]F"})
    with alone_in(tmp_path), pytest.raises(ValueError, match="another study is going on here"):
        run_study(study, console=QUIET)
    run_study(study, console=QUIET)
    weights = tmp_path / "both" / "checkpoints" / "step-000004" / "model.safetensors"
    first, written = load_file(weights), weights.stat().st_mtime_ns
    with alone_in(tmp_path / "both"), pytest.raises(ValueError, match="both: another run is going on here"):
        run_study(study, fresh=True, console=QUIET)
    assert weights.stat().st_mtime_ns == written
    run_study(study, fresh=True, console=QUIET)
    assert weights.stat().st_mtime_ns > written
    second = load_file(weights)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    (tmp_path / "mine.txt").write_text("kept")
    data = run_study(small(text, tmp_path, patterns={"attention": "(AF)2"}, tokens=128), console=QUIET)
    assert [model["name"] for model in data["models"]] == ["attention"]
    assert not (tmp_path / "both").exists()
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_stopped_study_saves_and_goes_on(text, tmp_path, monkeypatch):
    study = small(text, tmp_path, tokens=6_400_000, jobs=2)
    records = [tmp_path / name / "metrics.jsonl" for name in study.patterns]
    until = time.monotonic() + 60

    def show(board, job):
        if time.monotonic() > until or all(path.exists() and path.stat().st_size for path in records):
            raise KeyboardInterrupt  # as Ctrl-C does, here or anywhere

    monkeypatch.setattr(Board, "show", show)
    with pytest.raises(Interrupted, match="stopped, saved"):
        run_study(study, console=QUIET)
    for name in study.patterns:
        saved = latest(tmp_path / name)
        assert saved is not None
        assert last_step(tmp_path / name / "metrics.jsonl")["step"] == step_of(saved)
        assert not finished(study.run(name, 300))


def test_a_run_that_fails_stops_the_study(text, tmp_path):
    study = small(text, tmp_path, training={"device": "nowhere", "batch": 2})
    with pytest.raises(TrainingStopped, match="device 'nowhere'"):
        run_study(study, console=QUIET)
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / "both").exists()


def test_results_are_json_whatever_was_found(tmp_path):
    path = write_results(tmp_path, {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, "d": True}})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": [None, [None, 1.5]],
        "b": {"c": None, "d": True},
    }


@pytest.mark.parametrize(
    "change",
    [
        {"sample_temperature": math.nan},
        {"sample_temperature": -1},
        {"decode_contexts": [0, 4]},
        {"decode_contexts": []},
        {"state_contexts": [-1]},
        {"tokens": math.inf},
        {"dim": -1},
        {"jobs": 0},
        {"threads": True},
        {"sample_prompt": ""},
        {"training": {"lr": math.nan}},
    ],
    ids=str,
)
def test_a_study_takes_no_number_that_is_none(text, tmp_path, change):
    with pytest.raises(ValueError, match=next(iter(change))) as said:
        small(text, tmp_path, **change)
    assert "\n" not in str(said.value)


def test_settings_that_cannot_be_meant(text, tmp_path):
    with pytest.raises(ValueError, match="less than one step"):
        run_study(small(text, tmp_path, tokens=60), console=QUIET)
    with pytest.raises(ValueError, match="no patterns"):
        small(text, tmp_path, patterns={})
    with pytest.raises(ValueError, match="training.steps"):
        small(text, tmp_path, training={"steps": 3})
    with pytest.raises(ValueError, match="did you mean 'parameters'"):
        small(text, tmp_path, paramters=3)
