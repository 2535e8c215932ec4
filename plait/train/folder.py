"""What a run's folder holds: names, and which checkpoints are whole. No torch here.

    run.yaml                    the resolved config
    tokenizer/                  its files
    metrics.jsonl               one JSON object a step or evaluation
    checkpoints/step-000020/    the model as `plait.save` writes it, training.safetensors, training.json

A checkpoint is written under a name that begins with a dot and renamed when it is on disk, so what has such a name is
whole, and the newest is found by looking.
"""

import re
import shutil
from pathlib import Path

CONFIG = "run.yaml"
METRICS = "metrics.jsonl"
NAME = re.compile(r"step-(\d{6,})")


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint's name gives."""
    match = NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    parent = Path(run) / "checkpoints"
    if not parent.is_dir():
        return []
    return sorted((path for path in parent.iterdir() if NAME.fullmatch(path.name)), key=step_of)


def latest(run: Path) -> Path | None:
    """A run's newest checkpoint."""
    oldest_first = checkpoints(run)
    return oldest_first[-1] if oldest_first else None


def remove_leftovers(run: Path) -> None:
    """Delete what a killed save or a killed removal left behind."""
    for path in (Path(run) / "checkpoints").glob(".step-*"):
        shutil.rmtree(path)
