"""Objectives, starts and batches of one's own in the one training loop."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import plait
from plait.data import ByteTokenizer, prepare
from plait.model import Distillation, Regression
from plait.train import Ended, RunConfig, train
from plait.train.heldout import heldout_documents


def losses(result):
    return [record["loss"] for record in result.history if "loss" in record]


def test_a_start_goes_on_from_the_weights_with_their_tokenizer(make_run, quiet, tmp_path):
    run = make_run("DF", "first", steps=30)
    first = train(run.replace(data=run.data.replace(tokenizer={"bpe": 280})), console=quiet)
    again = make_run("DF", "second", steps=3, warmup=0).replace(design=None, start=str(tmp_path / "first"))
    second = train(again, console=quiet)
    assert second.model.design == first.model.design
    assert second.tokenizer.hash == first.tokenizer.hash
    assert losses(second)[0] < 0.9 * losses(first)[0]
    assert "start: " in (tmp_path / "second/run.yaml").read_text(encoding="utf-8")
    on = train(again.replace(steps=5, resume=True), console=quiet)
    assert on.step == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"design": {"dim": 64, "pattern": "MF"}}, "leave `design` out to train the one that it holds"),
        ({"design": None, "start": "nowhere"}, "nowhere"),
    ],
)
def test_starts_that_cannot_be(make_run, quiet, tmp_path, changes, message):
    plait.save(plait.build({"vocab": 257, "dim": 64, "pattern": "DF"}), tmp_path / "model")
    run = make_run("DF", "run").replace(**{"start": str(tmp_path / "model"), **changes})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(run, console=quiet)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_distillation(make_run, quiet):
    """Held-out text is measured by what is trained on."""
    run = make_run("AF", steps=15, eval_tokens=100_000)
    design = {"vocab": 257, "dim": 64, "pattern": "DF"}
    teacher = plait.build(design, seed=3)
    result = train(run, objective=lambda model: Distillation(model, teacher), console=quiet)
    assert losses(result)[-1] < losses(result)[0]
    assert all(
        torch.equal(a, b) for a, b in zip(teacher.parameters(), plait.build(design, seed=3).parameters(), strict=True)
    )
    assert result.heldout.loss == pytest.approx(heldout_kl(run, result.model, teacher), rel=1e-5)
    assert result.heldout.bits_per_byte is None and not any("bits_per_byte" in record for record in result.history)


@torch.no_grad()
def heldout_kl(run, model, teacher):
    """A token, over the pieces that held-out documents are cut into, one at a time."""
    shards = prepare(run.data.source, ByteTokenizer(), run.data.cache, heldout=run.data.heldout)
    total, count = 0.0, 0
    for document in heldout_documents(shards):
        *pieces, last = torch.from_numpy(next(document)).split(run.data.length)
        for piece, scored in (*((piece, len(piece)) for piece in pieces), (last, len(last) - 1)):
            theirs, ours = (m(piece[None])[0][0, :scored].log_softmax(-1) for m in (teacher, model))
            total += torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True).item()
            count += scored
    return total / count


@dataclass
class Waves:
    """Sine waves to be continued; where they are is one number."""

    step: int = 0

    def __next__(self):
        self.step += 1
        phase = torch.arange(4.0)[:, None] + self.step
        wave = torch.sin(phase + 0.3 * torch.arange(33))[..., None]
        return Rows(wave[:, :-1], wave[:, 1:])

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


class Rows(SimpleNamespace):
    cu_seqlens = None

    def __init__(self, inputs, targets):
        super().__init__(inputs=inputs, targets=targets)

    def part(self, start, end):
        return Rows(self.inputs[start:end], self.targets[start:end])

    def to(self, device):
        return Rows(self.inputs.to(device), self.targets.to(device))


WAVES = {
    "dim": 64,
    "pattern": "DF",
    "front": {"kind": "vectors", "features": 1},
    "head": {"kind": "regression", "outputs": 1},
}


def test_batches_that_end(tmp_path, quiet):
    class Three(Waves):
        def __next__(self):
            if self.step == 3:
                raise StopIteration
            return super().__next__()

    run = RunConfig(design=WAVES, folder=str(tmp_path / "run"), steps=5, save_every=2, device="cpu")
    with pytest.raises(
        Ended, match="^batches ended after step 3 of 5: give endless ones; the last good .*step-000002$"
    ):
        train(run, objective=Regression, batches=Three(), console=quiet)
    assert train(run, objective=Regression, batches=Waves(), console=quiet).done == 3


def test_regression_on_batches_of_ones_own(tmp_path, quiet):
    """Trained, accumulated, saved, resumed to the bit, measured."""

    def run(folder, steps, **changes):
        return RunConfig(
            design=WAVES, folder=str(tmp_path / folder), steps=steps, device="cpu", warmup=0.0, lr_end=1.0, **changes
        )

    def go(folder, steps, **changes):
        held = lambda: [next(Waves(1000))]  # noqa: E731
        return train(run(folder, steps, **changes), objective=Regression, batches=Waves(), heldout=held, console=quiet)

    whole = go("whole", 20)
    assert losses(whole)[-1] < 0.2 * losses(whole)[0]
    assert 0 < whole.heldout.loss < losses(whole)[0] and whole.heldout.tokens == 4 * 32
    assert losses(go("parts", 20, batch=4, accumulate=2)) == pytest.approx(losses(whole), rel=1e-3)
    go("cut", 12)
    cut = go("cut", 20, resume=True)
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(a, b)
    records = [
        json.loads(line) for line in Path(tmp_path, "cut/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert "bits_per_byte" not in records[-1] and "heldout_loss" in records[-1]
