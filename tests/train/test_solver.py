"""What a run records and says about the solvers of its recurrent layers."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import plait
from plait.data import ByteTokenizer, Loader, prepare
from plait.layers.channels import Channels, Outbox
from plait.model import NextToken
from plait.ops.shooting import Info
from plait.train import Interrupted, Unsolved, latest, train
from plait.train.metrics import read_metrics
from plait.train.solver import SolverRecord, as_data, read, records, together
from plait.train.step import backward

NEVER = {"tol": 1e-30, "max_passes": 1}  # what no solver reaches


def design(pattern: str, **layers) -> dict:
    return {"dim": 64, "pattern": pattern, "layers": layers}


def sent(**layers) -> Channels:
    """What a call tells of layers: passes, gap, and whether it fell back."""
    channels = Channels()
    for letter, (passes, gap, fell_back) in layers.items():
        info = Info(torch.tensor(passes, dtype=torch.int32), torch.tensor(gap), torch.tensor(fell_back))
        channels.take(Outbox(stats=[(("", "solver"), info, "max")]), {"": f"{letter[0]}#{letter[1]}"})
    return channels


def solver_records(run) -> list[dict]:
    return [r["solver"] for r in read_metrics(Path(run.folder) / "metrics.jsonl") if "loss" in r]


def test_parts_of_a_batch_count_as_one_call_and_calls_add_up():
    parts = sent(G0=(2, 1e-7, False), G1=(8, 0.5, True))
    parts.join(sent(G0=(3, 1e-8, False), G1=(2, 0.1, False)))
    found = read(parts)
    assert found == {"G#0": SolverRecord(1, 3, pytest.approx(1e-7), 0), "G#1": SolverRecord(1, 8, 0.5, 1)}
    both = together(found, read(sent(G1=(2, float("nan"), False), G2=(1, 0.0, False))))
    assert as_data(both) == {
        "G#0": {"passes": 3, "gap": 1e-7, "fell_back": 0},
        "G#1": {"passes": 5.0, "gap": None, "fell_back": 1},
        "G#2": {"passes": 1, "gap": 0.0, "fell_back": 0},
    }
    assert read(Channels()) == records({"A#0": {"other": 1}}) == {}


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, {"accumulate": 4}])
def test_every_step_records_every_recurrent_layer(make_run, quiet, changes):
    run = make_run(design=design("GF [A|SG]"), steps=4, eval_every=4, length=64, **changes)
    train(run, console=quiet)
    records = solver_records(run)
    assert len(records) == 4
    for record in records:
        assert list(record) == ["G#0", "S#0", "G#1"]
        for layer in record.values():
            assert set(layer) == {"passes", "gap", "fell_back"}
            assert 2 <= layer["passes"] <= 8 and 0 <= layer["gap"] < 1e-5 and layer["fell_back"] == 0
    heldout = [r for r in read_metrics(Path(run.folder) / "metrics.jsonl") if "heldout_loss" in r]
    assert list(heldout[0]["solver"]) == list(records[0])


def test_other_designs_record_nothing_about_solvers(make_run, quiet):
    history = train(make_run("DF", steps=2), console=quiet).history
    assert all("solver" not in record for record in history)


def test_checkpointing_and_parts_change_no_number_but_by_rounding(corpus):
    batch = next(Loader(prepare(corpus, ByteTokenizer(), corpus.parent / "cache", heldout=0.2), batch=8, length=64))
    model = plait.build(design("GF S", G={"kind": "gru", "max_passes": 1, "tol": 1e-3}) | {"vocab": 257})
    plain, parts, recomputed = Channels(), Channels(), Channels()
    objective = NextToken(model)
    backward(objective, batch, 1, "float32", channels=plain)
    backward(objective, batch, 4, "float32", channels=parts)
    model.activation_checkpointing = True
    backward(objective, batch, 1, "float32", channels=recomputed)
    assert read(recomputed) == read(plain)
    assert read(parts).keys() == read(plain).keys()
    assert read(plain)["G#0"].fell_back == read(parts)["G#0"].fell_back == 1


def test_a_fall_back_is_said_once_and_counted_at_the_end(make_run):
    run = make_run(design=design("GF H", H={"kind": "lstm", **NEVER}), steps=5, eval_every=0, length=64)
    out = io.StringIO()
    train(run, console=Console(file=out, width=200))
    lines = [line for line in out.getvalue().splitlines() if "fell back" in line]
    assert lines[0].startswith("step 1: H#0 fell back to one token after the other, exact but slow: a gap of ")
    assert "was left after 1 passes; a smaller `clip`" in lines[0]
    assert lines[1:] == ["H#0 fell back to one token after the other in 5 of 5 steps"]
    assert [record["H#0"]["fell_back"] for record in solver_records(run)] == [1] * 5
    assert all(json.dumps(record, allow_nan=False) for record in solver_records(run))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("when", [{"sample_every": 7}, {"sample_every": 7, "eval_every": 7}])
def test_a_strict_layer_stops_the_run_and_is_named(make_run, quiet, checkpointing, when):
    strict = {"kind": "gru", "strict": True}
    changes = {"eval_every": 0, "save_every": 5, "activation_checkpointing": checkpointing} | when
    run = make_run(design=design("GF [A|FG]F", G=strict), length=64, **changes)

    def sample(model, tokenizer, prompt: str) -> str:
        layer = model.slots[2].mixer.branches[1].layers[1]
        layer.cell.config = layer.cell.config.replace(**NEVER)
        return ""

    with pytest.raises(Unsolved) as caught:
        train(run, sample=sample, console=quiet)
    assert not isinstance(caught.value, Interrupted)
    said = str(caught.value)
    assert said.startswith("step 8: G#1: GRU: a gap of ")
    assert said.endswith(f"the last good checkpoint is {latest(Path(run.folder))}")
    assert latest(Path(run.folder)).name == "step-000005"
    assert "\n" not in said
    assert train(run.replace(sample_every=0), console=quiet).step == 20


def test_a_strict_layer_stops_an_evaluation_too(make_run, quiet):
    run = make_run(design=design("GF", G={"kind": "gru", "strict": True}), eval_every=10, save_every=5, length=64)
    start = train(run.replace(steps=5), console=quiet)
    model = start.model
    model.slots[0].mixer.cell.config = model.slots[0].mixer.cell.config.replace(**NEVER)
    from plait.model import NextToken
    from plait.ops.shooting import NotConverged
    from plait.train import heldout_loss

    shards = prepare(run.data.source, ByteTokenizer(), run.data.cache, heldout=0.2)
    with pytest.raises(NotConverged, match=r"^G#0: GRU: a gap"):
        heldout_loss(NextToken(model), shards, batch=2, length=64, tokens=128)
