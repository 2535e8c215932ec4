"""20 steps = 10 + resume + 10, to the bit, also when the process is killed at any moment of a save."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from plait.data import train_bpe
from plait.train import Interrupted, checkpoints, latest, load_run, train

EXPERTS = {"dim": 64, "pattern": "EA", "layers": {"E": {"kind": "moe", "hidden": 16, "bias_rate": 0.01}}}
CLOCK = ("seconds", "step_s", "tokens_per_s")
KILLER = Path(__file__).with_name("killed_saves.py")


def contents(run: Path) -> dict[str, object]:
    """Everything that a finished run left, without what a clock wrote."""
    checkpoint = latest(run)
    assert checkpoint is not None
    tensors = {  # not the files' bytes: safetensors writes its metadata in any order
        f"{path.name} {name}": tensor.numpy().tobytes()
        for path in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in sorted(load_file(path).items())
    }
    facts = json.loads((checkpoint / "training.json").read_text())
    facts = {key: value for key, value in facts.items() if key not in (*CLOCK, "run", "files")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
    return tensors | {"facts": facts, "metrics": metrics}


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("AF", {}),
        ("[M|D]F", {"optimizer": "muon", "schedule": "wsd"}),
        ("(DF)2AF", {"accumulate": 2, "precision": "bfloat16", "activation_checkpointing": True}),
        ("EA", {"design": EXPERTS}),
    ],
)
def test_resumed_equals_never_stopped(make_run, quiet, interrupt_once, pattern, changes):
    changes |= {"sample_every": 10}
    whole = make_run(pattern, "whole", **changes)
    train(whole, sample=lambda model, tokenizer, prompt: f"{prompt} {torch.rand(1).item()}", console=quiet)
    halves = make_run(pattern, "halves", **changes)
    sample = interrupt_once()
    with pytest.raises(Interrupted) as stopped:
        train(halves, sample=sample, console=quiet)
    assert stopped.value.checkpoint.name == "step-000010"
    torch.manual_seed(99)
    result = train(halves, sample=sample, console=quiet)
    assert result.step == 20
    assert contents(Path(whole.folder)) == contents(Path(halves.folder))


def test_a_stored_run_can_be_run_again(make_run, quiet):
    run = make_run(steps=4)
    train(run, console=quiet)
    again = load_run(Path(run.folder) / "run.yaml", folder=f"{run.folder}-again")
    train(again, console=quiet)
    assert contents(Path(run.folder)) == contents(Path(again.folder))


def test_a_finished_run_is_not_trained_further(make_run, quiet):
    run = make_run(steps=4)
    first = train(run, console=quiet)
    before, stored = contents(Path(run.folder)), (Path(run.folder) / "run.yaml").read_text()
    second = train(run.replace(resume=True, eval_every=3), console=quiet)
    assert contents(Path(run.folder)) == before
    assert (Path(run.folder) / "run.yaml").read_text() == stored
    assert (first.done, second.done) == (4, 0)
    assert (second.step, second.tokens, second.seconds) == (first.step, first.tokens, first.seconds)
    assert second.heldout == first.heldout


def test_metrics_past_the_checkpoint_are_written_once(make_run, quiet):
    run = make_run(steps=10, save_every=5, keep_last=9)
    train(run, console=quiet)
    expected = contents(Path(run.folder))
    os.rename(checkpoints(Path(run.folder))[-1], Path(run.folder) / "checkpoints" / "gone")
    with (Path(run.folder) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # killed while writing
    train(run, console=quiet)
    assert contents(Path(run.folder)) == expected


def test_changes_that_make_it_another_run_are_refused(make_run, quiet):
    train(make_run(steps=2), console=quiet)
    for changes, said in [
        ({"steps": 2, "lr": 0.5}, "lr 0.001, not 0.5: give another folder, or resume=true"),
        ({"steps": 9}, "steps 2, not 9: give another folder, or resume=true"),
        ({"steps": 2, "seed": 7, "resume": True}, "seed 0, not 7: give another folder"),
        ({"steps": 2, "pattern": "DF", "resume": True}, "design"),
        ({"steps": 2, "length": 16, "resume": True}, "with data.length 32, not 16: give another folder"),
        ({"steps": 2, "start": "elsewhere", "resume": True}, "start None, not 'elsewhere': give another folder"),
        ({"steps": 2, "resume": False}, "has a checkpoint, step-000002"),
    ]:
        with pytest.raises(ValueError, match=".") as caught:
            train(make_run(**changes), console=quiet)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    result = train(make_run(steps=4, lr=0.5, batch=2, resume=True), console=quiet)
    assert (result.step, result.tokens) == (4, 2 * 4 * 32 + 2 * 2 * 32)


@pytest.mark.parametrize(("then", "size"), [("bytes", 300), ({"bpe": 290}, 300)])
def test_another_tokenizer_to_train_is_refused(make_run, quiet, then, size):
    run = make_run(steps=2)
    train(run.replace(data=run.data.replace(tokenizer=then)), console=quiet)
    other = run.replace(data=run.data.replace(tokenizer={"bpe": size}), steps=4, resume=True)
    with pytest.raises(ValueError, match=r"data\.tokenizer .*, not \{'bpe': 300\}: give another folder$"):
        train(other, console=quiet)


def test_a_key_that_another_version_wrote_is_named_with_its_file(make_run, quiet):
    run = make_run(steps=2)
    facts = train(run, console=quiet).checkpoint / "training.json"
    facts.write_text(facts.read_text(encoding="utf-8").replace('"warmup"', '"warmpu"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"training\.json: run: unknown key 'warmpu'; did you mean 'warmup'"):
        train(run, console=quiet)


class _Lost(io.StringIO):
    """A screen that takes two lines."""

    def __init__(self, error: OSError):
        super().__init__()
        self.error, self.left = error, 2

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return len(text)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), BrokenPipeError(errno.EPIPE, "")])
def test_a_run_outlives_its_screen(make_run, error, capfd):
    result = train(make_run(steps=4), console=Console(file=_Lost(error)))
    assert (result.step, result.checkpoint.name) == (4, "step-000004")


@pytest.mark.parametrize("resume", ["auto", True])
def test_fewer_steps_than_are_done_are_refused(make_run, quiet, resume):
    train(make_run(steps=4), console=quiet)
    stored = contents(Path(make_run().folder))
    with pytest.raises(
        ValueError, match="has done 4 steps, more than steps=3: give at least as many, or another folder"
    ):
        train(make_run(steps=3, resume=resume), console=quiet)
    assert contents(Path(make_run().folder)) == stored


def test_resuming_nothing_is_refused(make_run, quiet):
    with pytest.raises(ValueError, match="no checkpoint to go on from"):
        train(make_run(resume=True), console=quiet)


def test_another_text_is_refused(make_run, quiet, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("one two three four\n" * 50)
    run = make_run(steps=2)
    run = run.replace(data=run.data.replace(source=str(text)))
    train(run, console=quiet)
    text.write_text("five six seven eight\n" * 50)
    with pytest.raises(ValueError, match="this text or tokenizer is not what"):
        train(run, console=quiet)


def test_the_same_text_elsewhere_is_gone_on_with(make_run, quiet, tmp_path):
    """Touched, copied, moved; read through another path with an empty cache; and a tokenizer that was moved too."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one/tale.txt").write_text("one two three four\n" * 50, encoding="utf-8")
    for name, words in (("words", "one two"), ("others", "three four")):
        train_bpe([words], 260).save(tmp_path / "one" / name)

    def run(steps, home, source="tale.txt", tokenizer=None, cache="cache"):
        run = make_run(steps=steps, resume=True if steps > 1 else "auto")
        data = {"source": str(tmp_path / home / source), "cache": str(tmp_path / cache)}
        return run.replace(data=run.data.replace(tokenizer=tokenizer or str(tmp_path / home / "words"), **data))

    train(run(1, "one"), console=quiet)
    os.utime(tmp_path / "one/tale.txt", ns=(1, 1))
    train(run(2, "one"), console=quiet)
    (tmp_path / "one").rename(tmp_path / "two")
    train(run(3, "two"), console=quiet)
    (tmp_path / "two/tale.txt").rename(tmp_path / "two/story.txt")
    assert train(run(4, "two", "story.txt", cache="other"), console=quiet).step == 4
    with pytest.raises(ValueError, match="this text or tokenizer is not what"):
        train(run(5, "two", "story.txt", tokenizer=str(tmp_path / "two/others")), console=quiet)
    (tmp_path / "two/story.txt").write_text("four three two one\n" * 50, encoding="utf-8")
    with pytest.raises(ValueError, match="this text or tokenizer is not what"):
        train(run(5, "two", "story.txt"), console=quiet)


@pytest.mark.skipif(os.name != "posix", reason="umask is POSIX's")
def test_all_files_of_a_run_have_one_mode(make_run, quiet):
    before = os.umask(0o027)
    try:
        run = make_run(steps=1)
        train(run, console=quiet)
    finally:
        os.umask(before)
    files = [path for path in Path(run.folder).rglob("*") if path.is_file()]
    assert len(files) > 8
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_any_moment_of_a_save(make_run, quiet, tmp_path):
    """The 2nd step's save, and the removal of the 1st's checkpoint, killed before each call that changes the disk."""
    run = make_run("DF", "whole", steps=3, save_every=1, keep_last=1, eval_every=0, batch=1, length=16)
    train(run, console=quiet)
    expected = contents(Path(run.folder))
    child = [sys.executable, str(KILLER), str(Path(run.folder) / "run.yaml"), str(tmp_path / "killed")]
    done = subprocess.run(
        child, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) >= 30  # each file opened, synced and renamed, each folder, the removals
    assert {resumed for _, resumed in report} == {1, 2}
    assert all(status == -signal.SIGKILL for status, _ in report)
    for number in range(len(report)):
        folder = tmp_path / "killed" / str(number)
        assert contents(folder) == expected, number
        assert not list(folder.glob("checkpoints/.*"))
