"""One process in a run's folder at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from plait.train import latest, train
from plait.train.lock import LOCK, alone_in

HOLD = "import sys; from pathlib import Path; from plait.train.lock import alone_in\n"
HOLD += "with alone_in(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_a_second_run_is_refused_and_harms_nothing(make_run, quiet):
    run = make_run(steps=4, save_every=2, eval_every=0, sample_every=3)
    refused = []

    def second(model, tokenizer, prompt: str) -> str:
        (Path(run.folder) / "checkpoints" / ".step-000004.tmp").mkdir()  # as if a save were going on
        with pytest.raises(ValueError, match="another run is going on here; wait for its end, or give another") as said:
            train(run.replace(steps=9), console=quiet)
        refused.append(str(said.value))
        assert (Path(run.folder) / "checkpoints" / ".step-000004.tmp").exists()
        return ""

    result = train(run, sample=second, console=quiet)
    assert refused == [f"{run.folder}: another run is going on here; wait for its end, or give another folder"]
    assert [record["step"] for record in result.history if "loss" in record] == [1, 2, 3, 4]
    assert train(run, console=quiet).done == 0  # free again


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_lock_of_a_dead_process_holds_nobody(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="going on here"), alone_in(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    assert (tmp_path / LOCK).exists()
    with alone_in(tmp_path):
        pass


def test_a_folder_that_was_only_locked_is_taken_away(tmp_path):
    with pytest.raises(KeyError), alone_in(tmp_path / "a"):
        raise KeyError
    assert not (tmp_path / "a").exists()
    with alone_in(tmp_path / "b"):
        (tmp_path / "b" / "kept").touch()
    assert (tmp_path / "b" / "kept").exists()


def test_a_run_that_fails_lets_go(make_run, quiet):
    with pytest.raises(ValueError, match="device"):
        train(make_run(device="nowhere"), console=quiet)
    assert latest(Path(train(make_run(steps=1), console=quiet).folder)) is not None
