"""Training on a CUDA device."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from plait.train import Interrupted, latest, train
from plait.train.late import Late

pytestmark = [
    pytest.mark.gpu,
    # torch's own doing: Dynamo looks at a slot's input; autograd's thread begins without a CUDA context
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses(result) -> list[float]:
    return [record["loss"] for record in result.history if "loss" in record]


@pytest.mark.parametrize("pattern", ["AF", "[M|D]F"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_trains_as_on_the_cpu(make_run, quiet, pattern, optimizer):
    changes = {"optimizer": optimizer, "steps": 10}
    gpu = train(make_run(pattern, "gpu", device="cuda", **changes), console=quiet)
    assert gpu.model.device.type == "cuda"
    cpu = train(make_run(pattern, "cpu", device="cpu", **changes), console=quiet)
    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-2)  # ten steps drift apart from one rounding
    assert losses(gpu)[0] == pytest.approx(losses(cpu)[0], rel=1e-5)


@pytest.mark.parametrize("changes", [{"precision": "bfloat16"}, {"activation_checkpointing": True, "accumulate": 2}])
def test_resumed_goes_on_from_the_same_weights(make_run, quiet, interrupt_once, changes):
    run = make_run("[M|D]F A", device="cuda", sample_every=10, **changes)
    with pytest.raises(Interrupted):
        train(run, sample=interrupt_once(), console=quiet)
    halves = train(run, console=quiet)
    whole = train(make_run("[M|D]F A", "whole", device="cuda", **changes), console=quiet)
    assert losses(halves)[:11] == pytest.approx(losses(whole)[:11], rel=1e-3)
    assert "rng.cuda.0" in load_file(latest(Path(run.folder)) / "training.safetensors")


def test_compiled_slots_train_alike(make_run, quiet):
    plain = train(make_run("AF", "plain", device="cuda", steps=5), console=quiet)
    compiled = train(make_run("AF", "compiled", device="cuda", steps=5, compile=True), console=quiet)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)


def test_numbers_are_read_before_what_was_queued_after_them():
    x, there = torch.randn(8192, 8192, device="cuda"), torch.cuda.Event()
    late = Late({"sum": x.sum(), "layer": torch.arange(3, device="cuda")})
    for _ in range(100):  # a second or so
        x = x @ x
    there.record()
    assert late.read() == {"sum": pytest.approx(0, abs=1e6), "layer": [0, 1, 2]}
    assert not there.query()
