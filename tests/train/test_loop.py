"""The loop as a user meets it: it learns, records, shows, and stops when told to."""

import io
import json
import signal
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console

from plait.train import Interrupted, TrainingStopped, latest, load_run, train
from plait.train.display import duration
from plait.train.signals import Signals


@pytest.mark.parametrize("pattern", ["AF", "[M|D]F", "(DF)2AF"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(make_run, quiet, pattern, optimizer):
    result = train(make_run(pattern, optimizer=optimizer, steps=60, lr=3e-3, eval_every=20), console=quiet)
    heldout = [record["bits_per_byte"] for record in result.history if "bits_per_byte" in record]
    assert len(heldout) == 3
    assert heldout[0] > heldout[1] > heldout[2]
    assert heldout[2] < 3.8  # of 8 at first; the letters' own frequencies give about 4.1
    assert result.heldout.bits_per_byte == heldout[2]


def test_what_was_passed_over_and_what_could_not_be_is_said(make_run, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name, content in {"a": b"one two " * 40, "b": b"three " * 40, "c": b"\xff", "d": b" ", "e": b""}.items():
        (folder / f"{name}.txt").write_bytes(content)
    run, said = make_run(steps=1), Console(file=io.StringIO())
    train(run.replace(data=run.data.replace(source=str(folder), tokenizer={"bpe": 4096})), console=said)
    shown = said.file.getvalue()
    assert "documents passed over: 1 binary, 2 empty; it has no more than " in shown
    assert "tokens for the tokenizer\n" in shown


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ({"front": {"kind": "vectors", "features": 3}}, "design.front: this model reads vectors, .* give `batches`"),
        (
            {"head": {"kind": "regression", "outputs": 3}},
            "design.head: this model gives vectors, .* give an `objective`",
        ),
    ],
)
def test_text_needs_a_model_from_tokens_to_logits(make_run, quiet, ends, said):
    run = make_run(design={"dim": 64, "pattern": "AF"} | ends)
    with pytest.raises(ValueError, match=said):
        train(run, console=quiet)
    assert not Path(run.folder).exists()


@pytest.mark.parametrize("run", ["run.yaml", {"design": "AF"}])
def test_what_is_no_run_is_refused(run):
    with pytest.raises(TypeError, match="expected a RunConfig, which plait.train.load_run reads from a file, got"):
        train(run)


def test_metrics_are_one_object_a_step(make_run, quiet):
    run = make_run(steps=10, sample_every=5, eval_every=0, accumulate=2)
    result = train(run, sample=lambda model, tokenizer, prompt: prompt + "\n…", console=quiet)
    lines = (Path(run.folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert records == result.history
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 11))
    assert set(steps[0]) == {"step", "loss", "lr", "grad_norm", "tokens", "step_s", "tokens_per_s"}
    assert steps[-1]["tokens"] == result.tokens == 10 * 4 * 32
    assert [record for record in records if "sample" in record][0] == {"step": 5, "sample": "def \n…"}
    assert [record["step"] for record in records if "heldout_loss" in record] == [10]


def test_checkpointing_and_accumulation_change_no_result(make_run, quiet):
    def losses(folder: str, **changes) -> list[float]:
        history = train(make_run("[M|D]F A", folder, steps=6, **changes), console=quiet).history
        return [record["loss"] for record in history if "loss" in record]

    plain = losses("plain")
    assert losses("recomputed", activation_checkpointing=True) == plain
    assert losses("what is cheap recomputed", activation_checkpointing="cheap") == plain
    assert losses("in parts", accumulate=4) == pytest.approx(plain, rel=1e-4)
    # at a rate whose updates do not amplify rounding, losses agree to bfloat16's 8 bits, times a few
    gentle = losses("gentle", lr=1e-4)
    assert losses("bfloat16", lr=1e-4, precision="bfloat16") == pytest.approx(gentle, rel=0.01)


def test_clipping_bounds_the_step(make_run, quiet):
    def first_norm(folder: str, clip: float | None) -> tuple[float, float]:
        history = train(make_run(folder=folder, steps=3, clip=clip, warmup=0), console=quiet).history
        return history[0]["grad_norm"], history[1]["loss"]

    free, clipped, unclipped = (first_norm(str(clip), clip) for clip in (1e9, 1e-9, None))
    assert free == unclipped
    assert free[0] == clipped[0]  # the norm before clipping is what is recorded
    assert free[1] < clipped[1] - 0.1  # AdamW's epsilon swallows so small a gradient


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(make_run, quiet, interrupt_once, number):
    run = make_run(sample_every=3, save_every=0)
    with pytest.raises(Interrupted) as stopped:
        train(run, sample=interrupt_once(number), console=quiet)
    assert isinstance(stopped.value, TrainingStopped)
    assert stopped.value.exit_code == 130
    assert stopped.value.checkpoint == latest(Path(run.folder)) == Path(run.folder) / "checkpoints" / "step-000003"
    assert str(stopped.value) == f"stopped at step 3, saved; to go on: plait train {run.folder}"
    assert train(load_run(run.folder), console=quiet).step == 20


def test_a_second_signal_stops_at_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_works_outside_the_main_thread(make_run, quiet):
    done = []
    thread = threading.Thread(target=lambda: done.append(train(make_run(steps=2), console=quiet).step))
    thread.start()
    thread.join()
    assert done == [2]


def test_plain_lines_where_there_is_no_terminal(make_run):
    out = io.StringIO()
    train(make_run(steps=10), sample=None, console=Console(file=out, width=200))
    text = out.getvalue()
    assert "\x1b" not in text
    assert "step 10/10  loss " in text
    assert "tokens/s" in text
    assert "bits/byte" in text
    assert "saved" in text


def test_it_says_what_it_is_about_to_do_and_how_long_that_takes(make_run):
    out = io.StringIO()
    run = make_run(steps=30, eval_every=0)
    count = sum(p.numel() for p in train(run, console=Console(file=out, width=300)).model.parameters())
    first, second, third = out.getvalue().splitlines()[:3]
    assert first == f"AF: {count:,} parameters, float32 on cpu; folder {run.folder}"
    assert second.startswith(f"text: {run.data.source}, ")
    assert "tokens to train on; 30 steps of 128 read 3,840, " in second
    assert "step 1/30" in third
    assert "tokens/s: about " in out.getvalue()
    out.truncate(0)
    train(run, console=Console(file=out, width=300))
    assert "finished: " in out.getvalue()
    assert "tokens/s" not in out.getvalue()


def test_a_slow_precision_is_named(make_run, monkeypatch):
    for fast, said in ((torch.float32, True), (torch.bfloat16, False)):
        monkeypatch.setattr("plait.train.loop.fast_dtype", lambda device, fast=fast: fast)
        out = io.StringIO()
        train(make_run(folder=str(said), steps=1, precision="bfloat16"), console=Console(file=out, width=300))
        assert ("precision bfloat16 is slow on this cpu" in out.getvalue()) is said


def test_nothing_to_hold_out_is_said_before_training(make_run, quiet, tmp_path):
    (tmp_path / "ab.txt").write_text("ab")
    run = make_run()
    with pytest.raises(ValueError, match=r"ab\.txt: "):
        train(run.replace(data=run.data.replace(source=str(tmp_path / "ab.txt"))), console=quiet)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7200, "2 hours"), (2e6, "23 days")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_a_bar_on_a_terminal(make_run):
    out = io.StringIO()
    train(make_run(steps=3), console=Console(file=out, width=160, force_terminal=True))
    text = out.getvalue()
    assert "training" in text
    assert "3/3" in text
    assert "tokens/s" in text


def test_a_trained_tokenizer_is_cached_and_saved_with_the_run(make_run, quiet, tmp_path):
    run = make_run(steps=2)
    run = run.replace(data=run.data.replace(tokenizer={"bpe": 300}, cache=str(tmp_path / "cache")))
    result = train(run, console=quiet)
    assert result.tokenizer.vocab == result.model.design.vocab <= 300
    made = [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("bpe-300-")]
    assert len(made) == 1
    stamp = (made[0] / "tokenizer.json").stat().st_mtime_ns
    again = train(run.replace(folder=f"{run.folder}-again"), console=quiet)
    assert again.tokenizer.hash == result.tokenizer.hash
    assert (made[0] / "tokenizer.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "cudaa"}, "device 'cudaa'"),
        (
            {"design": {"dim": 64, "pattern": "AF", "vocab": 100}},
            "design.vocab 100 is smaller than the tokenizer's 257",
        ),
        ({"pattern": "(AF"}, "missing ')'"),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(make_run, quiet, tmp_path, changes, said):
    with pytest.raises(ValueError, match=".") as caught:
        train(make_run(**changes), console=quiet)
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()
