"""What a run's folder holds: names, and which checkpoints are whole. No torch here.

    run.yaml                    the resolved config
    tokenizer/                  its files
    metrics.jsonl               one JSON object a step or evaluation
    checkpoints/step-000020/    the model as `plait.save` writes it, or its additions as PEFT does; training.safetensors,
                                training.json

A checkpoint is written under a name that begins with a dot and renamed when it is on disk, so what has such a name is
whole, and the newest is found by looking.
"""

import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from plait.files import read_text

RUN = "run.yaml"
METRICS = "metrics.jsonl"
NAME = re.compile(r"step-(\d{6,})")
FORMAT = 1
TENSORS, FACTS = "training.safetensors", "training.json"
EDITABLE = "generation_config.json"  # settings for transformers, which a person may change
ADAPTER_CONFIG = "adapter_config.json"  # of a run that trains additions: says where the weights below them lie
NOT_THE_MODELS = (TENSORS, EDITABLE, ADAPTER_CONFIG)


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


def check_model(folder: Path) -> Path:
    """`folder`, a model's, to be used as a model alone. Raises ValueError where it is a checkpoint whose files are not what
    was saved; names the newest whole checkpoint before it."""
    if not (folder / FACTS).exists():
        return folder  # saved by other means: there is nothing to compare with
    _, damage = examine(folder, leave_out=NOT_THE_MODELS)
    if damage is None:
        return folder
    good = intact_before(folder.resolve(), leave_out=NOT_THE_MODELS)
    raise ValueError(f"{damage}: {f'the newest whole checkpoint is {good}' if good else 'there is no other whole one'}")


def intact_before(path: Path, leave_out: tuple[str, ...] = ()) -> Path | None:
    """The newest checkpoint older than `path` that is not damaged."""
    if NAME.fullmatch(path.name) is None:  # renamed or copied out of its run
        return None
    earlier = [other for other in checkpoints(path.parent.parent) if step_of(other) < step_of(path)]
    return next((other for other in reversed(earlier) if examine(other, leave_out)[1] is None), None)


def examine(path: Path, leave_out: tuple[str, ...] = ()) -> tuple[dict[str, Any], str | None]:
    """(what training.json says, what is wrong or None). Files in `leave_out` are not read."""
    try:
        facts = json.loads(read_text(path / FACTS))
        for key in ("step", "tokens", "seconds", "loader", "run"):
            facts[key]
        sums = [(name, expected) for name, expected in facts["files"].items() if name not in leave_out]
        if facts["format"] != FORMAT:
            return {}, f"{path / FACTS}: format {facts['format']}, this plait reads {FORMAT}"
    except FileNotFoundError:
        return {}, f"{path / FACTS} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, f"{path / FACTS} is damaged"
    for name, expected in sums:
        if not (path / name).is_file():
            return {}, f"{path / name} is missing"
        if checksum(path / name) != expected:
            return {}, f"{path / name} is damaged or cut short"
    return facts, None


def checksum(path: Path) -> int:
    """Of a file's bytes: CRC-32."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
