"""Child of test_resume: a save that is killed at its k-th call that changes the disk, for every k, then gone on from.

Usage: python killed_saves.py RUN.yaml FOLDER. Trains in FOLDER/run. In the save of step 2, copies of this process go on in
copies of the folder, FOLDER/0, FOLDER/1, ..., the k-th until its k-th call, up to one that is not killed. All are then
trained to their end; prints [[status, the step it was gone on from], ...] in JSON.
"""

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from plait.run_folder import step_of
from plait.train import RunConfig, checkpoints, latest, load_run, train
from plait.train import loop as loop_module
from plait.train.checkpoint import Checkpoint, save_checkpoint

CALLS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")  # names of audit events
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def killed_save(run: RunConfig, at: int, *rest: Any) -> int:
    """Save in a process of its own, everything loaded already, killed just before its `at`-th call; minus the signal that
    ended it, or 0."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            kill_at(at)
            save_checkpoint(run, *rest)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(at: int) -> None:
    count = 0

    def counted(*args: object) -> None:
        nonlocal count
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def heard(event: str, args: tuple) -> None:
        if event in CALLS or (event == "open" and args[2] & WRITES):
            counted()

    sys.addaudithook(heard)
    os.fsync = counted  # the one call that is not audited; a killed process loses nothing that the system has


def main(config: str, folder: Path) -> None:
    torch.set_num_threads(1)  # no threads, so that forking is safe
    run = load_run(config, folder=str(folder / "run"))
    killed: list[tuple[RunConfig, int]] = []

    def save(run: RunConfig, position: Any, *rest: Any) -> Path:
        status = -1
        while position.step == 2 and status != 0:
            copy = run.replace(folder=str(folder / str(len(killed))))
            shutil.copytree(run.folder, copy.folder)
            status = killed_save(copy, len(killed), position, *rest)
            if status != 0:
                killed.append((copy, status))
        return save_checkpoint(run, position, *rest)

    loop_module.save_checkpoint = save
    quiet = Console(file=io.StringIO())
    train(run, console=quiet)
    loop_module.save_checkpoint = save_checkpoint
    report = []
    for run, status in killed:
        for checkpoint in checkpoints(Path(run.folder)):
            Checkpoint.open(checkpoint)  # raises if it is not whole
        report.append([status, step_of(latest(Path(run.folder)))])
        torch.manual_seed(99)
        train(run, console=quiet)
        assert len(checkpoints(Path(run.folder))) == 1
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
