"""Layers that begin to contribute later: until then they add nothing and stay what they are."""

import io
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from plait.opening import load
from plait.run_folder import checkpoints
from plait.train import train


def moved(before, after, address) -> bool:
    pairs = zip(before.place(address).parameters(), after.place(address).parameters(), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own doing
@pytest.mark.parametrize("changes", [{}, {"compile": True, "optimizer": "muon"}, {"activation_checkpointing": True}])
def test_asleep_then_awake(make_run, quiet, changes, monkeypatch):
    """Alone in a slot or in a branch, decay or no decay. Graphs are made and differentiated, but no machine code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    run = make_run("DA [D|A]F", steps=4, delayed={"A": 2, "D#1": 0.75}, save_every=1, keep_last=4, **changes)
    train(run, console=quiet)
    models = [load(path) for path in checkpoints(Path(run.folder))]
    for step, (before, after) in enumerate(
        zip(models, models[1:], strict=False), 1
    ):  # the step that comes after `step`
        assert moved(before, after, "D#0")
        assert moved(before, after, "A#0") == moved(before, after, "A#1") == (step >= 2)
        assert moved(before, after, "D#1") == (step >= 3)


def test_resumed_it_sleeps_as_long(make_run, quiet):
    parts = make_run("DAF", "cut in two", steps=6, delayed={"A#0": 4}, schedule="wsd", warmup=0, decay=0)
    ways = []
    for folder, stops in (("once", (6,)), ("twice", (3, 6))):
        for steps in stops:
            own = {"folder": str(Path(parts.folder).parent / folder), "resume": "auto" if steps == stops[0] else True}
            result = train(parts.replace(steps=steps, **own), console=quiet)
        ways.append([record["loss"] for record in result.history if "loss" in record])
    assert ways[0] == ways[1]


@pytest.mark.parametrize(("steps", "said"), [(2, True), (3, False)])
def test_one_that_never_wakes_is_named(make_run, steps, said):
    out = io.StringIO()
    train(make_run("AF", steps=steps, delayed={"A": 2}), console=Console(file=out, width=200))
    assert ("delayed: A#0 would begin after the last of 2 steps" in out.getvalue()) is said


@pytest.mark.parametrize(
    ("delayed", "message"),
    [
        ({"B": 0.5}, "delayed: there is no letter or layer 'B'"),
        ({"A": 1.5}, "delayed.A must be a share of the steps below 1 or a whole number of steps, got 1.5"),
        ({"A": -1}, "delayed.A must be"),
    ],
)
def test_refused(make_run, quiet, delayed, message):
    with pytest.raises(ValueError, match=message):
        train(make_run("AF", delayed=delayed), console=quiet)
    assert not Path(make_run().folder, "run.yaml").exists()
