"""Doing a study: train each pattern, measure each, write the numbers and the page."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from plait.data import Shards, Tokenizer
from plait.data import prepare as prepare_shards
from plait.design.count import parameters
from plait.design.model import ModelConfig
from plait.evaluate.machine import machine
from plait.files import read_text, write_text
from plait.study.config import Study
from plait.study.measure import measure
from plait.study.pool import train_all
from plait.study.report import write_report
from plait.study.results import as_data, write_results
from plait.train import RunConfig
from plait.train.inputs import open_tokenizer
from plait.train.lock import alone_in

STUDY = "study.json"


def run_study(
    study: Study, *, command: str = "", fresh: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Train and measure every pattern; what is returned is also in the folder's results.json and drawn in report.html.

    Runs of this very study that are finished are measured again and not trained again, and one that was interrupted
    goes on where it stopped; `fresh` starts over. Runs of another study in the same folder are deleted first: a folder
    holds one study. `command` is what the report says to run to get it again.
    Raises what `train` raises, and ValueError for patterns that cannot be made equally large.
    """
    with threads(study.threads), alone_in(Path(study.folder), "another study"):
        return _run(study, command, fresh, console or Console(stderr=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(study: Study, command: str, fresh: bool, console: Console) -> dict[str, Any]:
    started = datetime.now(UTC)
    tokenizer, shards = open_text(study, console)
    runs = {name: study.run(name, tokenizer.vocab) for name in study.patterns}
    claim(study, runs, shards, fresh, console)
    for name, run in runs.items():
        design = ModelConfig.from_dict(run.design)
        say(console, f"{name}: {design.pattern}, {parameters(design):,} parameters, {run.steps} steps")
    train_all(runs, study.jobs, study.threads, console)
    models = []
    for name, run in runs.items():
        with console.status(f"measuring {name}"):
            models.append(measure(study, name, run))
        model = models[-1]
        say(
            console,
            f"{name}: {model.bits_per_byte:.4f} bits per byte held out, {model.train_seconds:.0f} s of training",
        )
    meta = shards.meta
    facts = {
        "command": command,
        "date": started.isoformat(timespec="seconds"),
        "seconds": (datetime.now(UTC) - started).total_seconds(),
        "text": {"documents": meta.documents, "heldout_documents": meta.heldout_documents, "bytes": meta.bytes},
        "tokenizer": tokenizer.name,
        "machine": machine(),
    }
    data = as_data(study.to_dict(), models, facts)
    write_results(Path(study.folder), data)
    write_report(Path(study.folder), data)
    return data


def say(console: Console, text: str) -> None:
    """One line of plain text."""
    console.print(text, markup=False, soft_wrap=True)


def open_text(study: Study, console: Console) -> tuple[Tokenizer, Shards]:
    """The tokenizer and the token shards, made where they are not cached yet."""
    with console.status("reading the text") as status:
        tokenizer = open_tokenizer(study.data)

        def progress(done: int, total: int | None) -> None:
            status.update(f"tokenizing: {done / 1e6:.1f} MB" + (f" of {total / 1e6:.1f}" if total else ""))

        shards = prepare_shards(
            study.data.source, tokenizer, study.data.cache, heldout=study.data.heldout, progress=progress
        )
    meta = shards.meta
    say(
        console,
        f"text: {meta.source}, {meta.bytes / 1e6:.1f} MB in {meta.documents:,} documents, of them held out "
        f"{meta.heldout_documents}; {tokenizer.name}, {meta.tokens:,} tokens",
    )
    return tokenizer, shards


def claim(study: Study, runs: dict[str, RunConfig], shards: Shards, fresh: bool, console: Console) -> None:
    """Make the folder this study's: runs of another one, or that are to be made afresh, are deleted."""
    folder = Path(study.folder)
    ours = {"runs": {name: run.to_dict() for name, run in runs.items()}, "text": shards.key}
    path = folder / STUDY
    theirs = json.loads(read_text(path)) if path.is_file() else ours
    if theirs != ours or fresh:
        say(console, f"{folder} held other runs, which are replaced")
        for name in theirs["runs"]:
            if (folder / name).is_dir():
                with alone_in(folder / name):
                    shutil.rmtree(folder / name, ignore_errors=True)
    write_text(path, json.dumps(ours, indent=1) + "\n")
