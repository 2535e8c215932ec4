"""What a stage is said to need, beside what a GPU was measured to use; what is said to fit, beside what is counted of that."""

import pytest
import torch

import plait
from plait.convert import Stages
from plait.convert.room import check_room, need
from plait.design.count import parameters
from plait.train import RunConfig

MEASURED = {
    "((DF)3 AF)6": 27.0,
    "((MF)3 AF)6": 28.5,
}  # GiB of a compiled step of 4 x 4,096 tokens (docs/performance.md)
SIZES = {"heads": 16, "kv_heads": 4, "head_dim": 64}


def run_of(**changes):
    return RunConfig(**{"batch": 8, "data": {"length": 2048}, "precision": "bfloat16", **changes})


@pytest.fixture(scope="module")
def teacher():
    """SmolLM2-135M's sizes."""
    attention = {"kind": "attention", "heads": 9, "kv_heads": 3}
    return plait.ModelConfig(
        vocab=49152, dim=576, pattern="(AF)30", layers={"A": attention, "F": {"kind": "swiglu", "hidden": 1536}}
    )


@pytest.mark.parametrize(("pattern", "measured"), MEASURED.items())
def test_a_step_needs_about_what_was_measured(pattern, measured):
    design = plait.ModelConfig(vocab=32000, dim=1024, pattern=pattern, layers={"A": {"kind": "attention", **SIZES}})
    needed = need(design, "distil", run_of(batch=4, data={"length": 4096}))
    alone = needed.all - 4 * parameters(design)  # no teacher was there
    assert 1 <= alone / (measured * 2**30) < 1.25


def test_a_step_of_a_student_needs_about_what_was_measured(teacher):
    """25 GiB beside the weights, for 24 x 1,024 tokens on an H100 (benchmarks/convert_smollm2.py)."""
    step = need(teacher, "distil", run_of(batch=24, data={"length": 1024})).step
    assert 0.98 < step / (25 * 2**30) < 1.25


def test_what_is_kept_is_counted(teacher):
    count = parameters(teacher)
    assert need(teacher, "distil", run_of()).kept == 20 * count  # two models, gradients, two moments
    assert 8 * count < need(teacher, "align", run_of()).kept < 20 * count
    whole = need(teacher, "distil", run_of()).step
    assert need(teacher, "distil", run_of(accumulate=8)).step < whole / 3
    assert need(teacher, "distil", run_of(activation_checkpointing=True)).step < whole / 2
    assert (
        need(teacher, "distil", run_of(activation_checkpointing="cheap")).step == whole
    )  # products are what is counted
    assert need(teacher, "distil", run_of(precision="float32")).step > 1.5 * whole


@pytest.mark.parametrize("free", [15, 7, 5, 4.2])
def test_what_is_said_to_fit_does(teacher, free):
    have, run = int(free * 2**30), run_of(batch=16)
    check_room(teacher, {"distil": run}, 40 * 2**30, "cuda:0")
    with pytest.raises(ValueError, match="would fit") as refused:
        check_room(teacher, {"distil": run}, have, "cuda:0")
    message = str(refused.value)
    said = dict(word.removeprefix("distil.").split("=") for word in message.split() if word.startswith("distil."))
    assert said and "\n" not in message
    length = int(said.pop("length", 2048))
    changes = {key: value == "true" if value == "true" else int(value) for key, value in said.items()}
    check_room(teacher, {"distil": run.replace(data={"length": length}, **changes)}, have, "cuda:0")


def test_what_can_never_fit(teacher):
    with pytest.raises(ValueError, match="a teacher of fewer than 53.7M parameters would fit"):
        check_room(teacher, {"align": run_of(), "distil": run_of()}, 2**30, "cuda:0")


def test_nothing_is_written_where_it_does_not_fit(make_asked, quiet, tmp_path, monkeypatch):
    stages = Stages(make_asked(), quiet)
    monkeypatch.setitem(stages.__dict__, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**30))
    with pytest.raises(ValueError, match="align: a step of 4 x 32 tokens needs about .* and cuda has 1 MiB free"):
        stages.upto("model")
    assert not (tmp_path / "out" / "plan.yaml").exists()
