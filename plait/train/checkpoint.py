"""Checkpoints: a model folder, and beside the weights all that the next step depends on. Never pickle."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plait.data import Tokenizer
from plait.design import ModelConfig
from plait.design.struct import Struct
from plait.files import naming, sync_folder
from plait.model import LanguageModel
from plait.model.adapter_files import base_name
from plait.run_folder import (
    ADAPTER_CONFIG,
    FACTS,
    FORMAT,
    checkpoint_path,
    checkpoints,
    checksum,
    examine,
    intact_before,
)
from plait.train.config import FIXED, FREE, RunConfig
from plait.train.inputs import Batches
from plait.train.optim import Optimizers
from plait.train.payload import SAFETENSORS, Payload


@dataclass(slots=True)
class Position:
    """How far a run is: optimizer steps, tokens read, seconds spent in steps."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_checkpoint(
    run: RunConfig,
    position: Position,
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    optimizers: Optimizers,
    place: dict[str, Any],
    payload: Payload = SAFETENSORS,
) -> Path:
    """Write a checkpoint of this moment, whole or not at all, then remove all but the newest `keep_last`. place: where the
    run's batches stand."""
    folder = Path(run.folder)
    final = checkpoint_path(folder, position.step)
    if not final.exists():  # a name is only given to a whole checkpoint, and equal steps of one run are equal
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            with naming(final, within=temporary):
                payload.save(temporary, model, tokenizer, optimizers)
                _write_facts(temporary, run, position, place)
            os.replace(temporary, final)
            sync_folder(final.parent)
            sync_folder(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for old in checkpoints(folder)[: -run.keep_last]:
        removed = old.with_name(f".{old.name}.old")  # renamed first: a half-deleted folder must not look whole
        os.replace(old, removed)
        shutil.rmtree(removed)
    return final


def _write_facts(folder: Path, run: RunConfig, position: Position, place: dict[str, Any]) -> None:
    """What there is besides tensors; then all of it is on disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = {
        "format": FORMAT,
        "step": position.step,
        "tokens": position.tokens,
        "seconds": position.seconds,
        "loader": place,
        "run": run.to_dict(),
        "files": {path.relative_to(folder).as_posix(): checksum(path) for path in files},
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for path in (*files, folder / FACTS):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files have been found whole."""

    path: Path
    facts: dict[str, Any]
    payload: Payload = SAFETENSORS

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Raises ValueError naming the damaged file and the newest good checkpoint before it."""
        facts, damage = examine(path, leave_out=(ADAPTER_CONFIG,))
        if damage is None:
            return cls(path, facts)
        good = intact_before(path)
        advice = (
            f"remove {path} to go on from {good}" if good else "no earlier checkpoint is whole; start in another folder"
        )
        raise ValueError(f"{damage}: {advice}")

    @property
    def position(self) -> Position:
        return Position(self.facts["step"], self.facts["tokens"], self.facts["seconds"])

    def check_same_run(self, run: RunConfig, loader: Batches) -> None:
        """Raise ValueError where `run` (its design resolved) is not what this checkpoint is a part of."""
        before = self.run
        for name in RunConfig.__struct_fields__:
            then, now = _comparable(before, name), _comparable(run, name)
            fixed = name in FIXED or (name == "start" and run.lora is None)  # whose weights have been trained since
            if then == now or name in FREE or (run.resume is True and not fixed):
                continue
            advice = "" if fixed else ", or resume=true to go on with the new one"
            what = _difference(name, getattr(before, name), getattr(run, name), then, now)
            raise ValueError(f"{self.path} belongs to a run with {what}: give another folder{advice}")
        self._check_tokenizer(before.data.tokenizer, run.data.tokenizer)
        if self.facts["loader"].get("shards") != loader.state_dict().get("shards"):
            raise ValueError(
                f"{run.data.source}: this text or tokenizer is not what {self.path} was trained on; give another folder"
            )

    @property
    def run(self) -> RunConfig:
        """The run that it belongs to. Raises ValueError naming the file where another version wrote it, with other keys."""
        try:
            return RunConfig.from_dict(self.facts["run"])
        except ValueError as error:
            raise ValueError(f"{self.path / FACTS}: {error}") from None

    def _check_tokenizer(self, then: str | dict[str, int], now: str | dict[str, int]) -> None:
        """Refuse one to be trained that is not the run's, which goes on with the tokenizer that it has. (One that is named
        may have moved; what it holds is in the shards' key.)"""
        if isinstance(now, dict) and then != now:
            raise ValueError(
                f"{self.path} belongs to a run with data.tokenizer {then!r}, not {now!r}: give another folder"
            )

    def load_model(self, run: RunConfig, device: torch.device) -> LanguageModel:
        """To be trained further; additions to the weights of `run.start`, or where those lay, seen from elsewhere."""
        if run.lora is None or run.start is None:
            return self.payload.load_model(self.path, device, None)
        base = run.start if Path(run.start).exists() else base_name(self.path)
        return self.payload.load_model(self.path, device, base)

    def restore(self, optimizers: Optimizers, loader: Batches) -> None:
        """Put optimizers, loader and random number generators where they were."""
        self.payload.restore(self.path, optimizers)
        loader.load_state_dict(self.facts["loader"])


def _comparable(run: RunConfig, name: str) -> Any:
    """A value of the run without what does not matter: how a design is spelled, where text, tokenizer and shards lie (what
    those hold is in the shards' key), and where a folder is that holds the run's own and the one that it starts from."""
    value = getattr(run, name)
    if name == "design":
        return ModelConfig.from_dict(value).hash
    if name == "start":
        beside = run.start is not None and Path(run.start).parent == Path(run.folder).parent
        return Path(value).name if beside else value
    return value.replace(source="stdlib", tokenizer="bytes", cache="cache") if name == "data" else value


def _difference(name: str, before: Any, after: Any, then: Any, now: Any) -> str:
    """In words, key by key where both are configs. then, now: their comparable values."""
    if not (isinstance(before, Struct) and isinstance(after, Struct)):
        return f"{name} {before!r}, not {after!r}"
    keys = [key for key in before.__struct_fields__ if getattr(then, key) != getattr(now, key)]
    return ", ".join(f"{name}.{key} {getattr(before, key)!r}, not {getattr(after, key)!r}" for key in keys)
