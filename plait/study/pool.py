"""Several training runs at a time, each in a process of its own, and how far they are."""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from plait.run_folder import METRICS, step_of
from plait.study.worker import INTERRUPTED
from plait.train import Interrupted, RunConfig, TrainingStopped, latest

LOOK_EVERY_S = 0.2
LINES = 8  # a run's lines in a plain log
TAIL = 4096  # bytes at the end of metrics.jsonl in which its last step is


@dataclass(slots=True)
class Job:
    """A run that is going on."""

    name: str
    run: RunConfig
    process: subprocess.Popen[str]
    errors: IO[str]
    shown: int = field(default=0)

    @classmethod
    def start(cls, name: str, run: RunConfig, threads: int) -> "Job":
        errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed with the job)
        process = subprocess.Popen(
            [sys.executable, "-m", "plait.study.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the study, which then ends its runs
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({"run": run.to_dict(), "threads": threads}) + "\n")
        process.stdin.flush()
        return cls(name, run, process, errors)

    def stop(self) -> None:
        """Ask it to finish its step and save."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def close(self) -> None:
        """Wait for its end."""
        self.stop()
        self.process.wait()
        self.errors.close()

    def check(self) -> bool:
        """Whether it has ended. Raises TrainingStopped with its last words where it did not end well."""
        code = self.process.poll()
        if not code:
            return code == 0
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines() or [f"the process ended with {code}"]
        kind = Interrupted if code == INTERRUPTED else TrainingStopped
        raise kind(f"{self.name}: {said[-1]}", Path(self.run.folder), latest(Path(self.run.folder)))


class Board:
    """A bar for each run on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        self.bars = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True
        )
        self.tasks: dict[str, TaskID] = {}

    def show(self, job: Job) -> None:
        record = last_step(Path(job.run.folder) / METRICS)
        if record is None:
            return
        step, steps = record["step"], job.run.steps
        facts = f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tokens/s"
        if job.name not in self.tasks:
            self.tasks[job.name] = self.bars.add_task(job.name, total=steps, facts=facts)
        self.bars.update(self.tasks[job.name], completed=step, facts=facts)
        if not self.console.is_terminal and step * LINES // steps > job.shown:
            job.shown = step * LINES // steps
            self.console.print(f"{job.name:<12} step {step}/{steps}  {facts}", markup=False, soft_wrap=True)


def train_all(runs: dict[str, RunConfig], jobs: int, threads: int, console: Console) -> None:
    """Train every run that is not finished, `jobs` at a time with `threads` CPU threads each.

    Raises TrainingStopped for the first that fails, after the others have saved and stopped; Interrupted for Ctrl-C.
    """
    waiting = {name: run for name, run in runs.items() if not finished(run)}
    going: list[Job] = []
    board = Board(console)
    try:
        with board.bars:
            while waiting or going:
                while waiting and len(going) < jobs:
                    name = next(iter(waiting))
                    going.append(Job.start(name, waiting.pop(name), threads))
                time.sleep(LOOK_EVERY_S)
                for job in list(going):
                    board.show(job)
                    if job.check():
                        going.remove(job)
                        job.close()
    except KeyboardInterrupt:
        raise Interrupted("stopped, saved; run it again to go on", Path(), None) from None
    finally:
        for job in going:
            job.stop()
        for job in going:
            job.close()


def finished(run: RunConfig) -> bool:
    """Whether the run's last checkpoint is there."""
    newest = latest(Path(run.folder))
    return newest is not None and step_of(newest) >= run.steps


def last_step(path: Path) -> dict[str, Any] | None:
    """The newest step's record in a metrics.jsonl that is being written."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().decode(errors="replace").splitlines(keepends=True)
    records = (json.loads(line) for line in reversed(lines) if line.startswith('{"step"') and line.endswith("}\n"))
    return next((record for record in records if "loss" in record), None)
