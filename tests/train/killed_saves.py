"""Child of test_resume: runs that are killed at the k-th call that changes the disk during a save, then gone on with.

Usage: python killed_saves.py RUN.yaml FOLDER. Runs k = 0, 1, ... in FOLDER/k until one is not killed, and prints
[[status, the step it was gone on from], ...] in JSON.
"""

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console

from plait.run_folder import step_of
from plait.train import Interrupted, RunConfig, checkpoints, latest, load_run, train
from plait.train import loop as loop_module
from plait.train.checkpoint import Checkpoint

CALLS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")  # names of audit events
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def quietly(run: RunConfig, **more) -> None:
    train(run, console=Console(file=io.StringIO()), **more)


def in_fork(work: Callable[[], None]) -> int:
    """Do `work` in a process of its own, everything loaded already; minus the signal that ended it, or 0."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_save(run: RunConfig, at: int) -> None:
    """Train; the save of step 10 is killed just before its `at`-th call."""
    count, inside = 0, False
    save, fsync = loop_module.save_checkpoint, os.fsync

    def counted() -> None:
        nonlocal count
        if inside and count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += inside

    def heard(event: str, args: tuple) -> None:
        if event in CALLS or (event == "open" and args[2] & WRITES):
            counted()

    def sync(descriptor: int) -> None:
        counted()
        fsync(descriptor)

    def watched(config, position, *rest):
        nonlocal inside
        inside = position.step == 10
        return save(config, position, *rest)

    sys.addaudithook(heard)
    os.fsync = sync  # the one call that is not audited
    loop_module.save_checkpoint = watched
    quietly(run)


def main(config: str, folder: Path) -> None:
    start = load_run(config, folder=str(folder / "start"))
    torch.set_num_threads(1)  # no threads, so that forking is safe
    with suppress(Interrupted):
        quietly(start.replace(sample_every=5), sample=lambda *_: signal.raise_signal(signal.SIGINT) or "")
    log = folder / "start" / "metrics.jsonl"  # without the sample, which the whole run did not have
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if "sample" not in line))
    report = []
    while True:
        run = start.replace(folder=str(folder / str(len(report))))
        shutil.copytree(folder / "start", run.folder)
        status = in_fork(lambda run=run: killed_save(run, len(report)))
        if status == 0:
            shutil.rmtree(run.folder)
            break
        for checkpoint in checkpoints(Path(run.folder)):
            Checkpoint.open(checkpoint)  # raises if it is not whole
        resumed = step_of(latest(Path(run.folder)))
        assert in_fork(lambda run=run: quietly(run)) == 0
        assert len(checkpoints(Path(run.folder))) == 1
        report.append([status, resumed])
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
