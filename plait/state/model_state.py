"""What a whole model remembers: one typed value per slot, and how many tokens each row has seen."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from plait.files import write_atomic
from plait.state.kv import KV
from plait.state.values import Branches, Nothing, Recurrent, SlotState, Window


@dataclass(frozen=True, eq=False)
class ModelState:
    """An immutable value: a model given a state returns a new one, and the old one may be used again."""

    slots: tuple[SlotState, ...]
    lengths: tuple[int, ...]
    design: str

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device | None:
        """Where its tensors are; None where no layer keeps any."""
        return next((x.device for slot in self.slots for x in slot.tensors().values()), None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, room reserved for further keys included."""
        return sum(x.nbytes for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, such as "3.s"."""
        return {f"{i}.{name}": x for i, slot in enumerate(self.slots) for name, x in slot.tensors().items()}

    def fork(self) -> Self:
        """A copy that shares no memory: both may go on independently."""
        return replace(self, slots=tuple(slot.map(torch.clone) for slot in self.slots))

    def detach(self) -> Self:
        """The same values cut off from their gradients, for truncated backpropagation through time."""
        return replace(self, slots=tuple(slot.map(torch.detach) for slot in self.slots))

    def to(self, device: str | torch.device) -> Self:
        """A copy on another device."""
        return replace(self, slots=tuple(slot.map(lambda x: x.to(device, copy=True)) for slot in self.slots))

    def select(self, rows: Sequence[int] | Tensor | np.ndarray) -> Self:
        """A copy of some rows, in the order given; a row may be taken more than once. Rows are whole numbers, in any kind of
        sequence or a tensor, or a mask: one bool for each row, true for those to keep."""
        picked = _row_numbers(rows, self.batch)
        lengths = tuple(self.lengths[row] for row in picked)

        def pick(x: Tensor) -> Tensor:
            return x[torch.tensor(picked, dtype=torch.int64, device=x.device)]

        return replace(self, slots=tuple(slot.map(pick, lengths) for slot in self.slots), lengths=lengths)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, atomically, with the hash of the design that it belongs to."""
        for slot in self.slots:
            slot.map(lambda x: x)  # raises where a handle is stale
        metadata = {
            "format": "plait-state",
            "design": self.design,
            "lengths": json.dumps(self.lengths),
            "slots": json.dumps([_kinds(slot) for slot in self.slots]),
        }
        tensors = {name: x.detach().contiguous() for name, x in self.tensors().items()}
        write_atomic(Path(path), lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read what `save` wrote; the model that gets the state refuses it if the design differs."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such state file")
        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a readable state file ({error}); it may be cut short") from None
        if metadata.get("format") != "plait-state":
            raise ValueError(f"{path}: a safetensors file, but not a state written by ModelState.save")
        lengths = tuple(json.loads(metadata["lengths"]))
        kinds = json.loads(metadata["slots"])
        slots = tuple(_restore(kind, f"{i}.", tensors, lengths) for i, kind in enumerate(kinds))
        return cls(slots, lengths, metadata["design"])


def _row_numbers(rows: Any, batch: int) -> list[int]:
    """What `select` was given, as row numbers from 0."""
    listed = _plain(rows)
    if not isinstance(listed, Iterable) or isinstance(listed, str | bytes | dict):
        raise ValueError(f"select takes a sequence of rows, such as [0] or a tensor of (rows,); got {rows!r}")
    listed = [_plain(row) for row in listed]
    if not listed:
        raise ValueError("select needs at least one row")
    if all(isinstance(row, bool) for row in listed):
        if len(listed) != batch:
            raise ValueError(
                f"select got a mask of {len(listed)} bools; the state has {batch} rows, and each needs one"
            )
        listed = [row for row, keep in enumerate(listed) if keep]
        if not listed:
            raise ValueError("select needs at least one row, and the mask keeps none")
    return [_row_number(row, batch) for row in listed]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value


def _row_number(row: Any, batch: int) -> int:
    if isinstance(row, bool) or not hasattr(row, "__index__"):
        raise ValueError(f"select takes whole numbers, or one bool for each row; got {row!r} among the rows")
    number = index(row)
    if not -batch <= number < batch:
        raise ValueError(f"row {number} does not exist; the state has {batch} rows")
    return number % batch


def _kinds(slot: SlotState) -> Any:
    return [_kinds(part) for part in slot.parts] if isinstance(slot, Branches) else slot.kind


def _restore(kind: Any, prefix: str, tensors: dict[str, Tensor], lengths: tuple[int, ...]) -> SlotState:
    if isinstance(kind, list):
        return Branches(tuple(_restore(part, f"{prefix}{i}.", tensors, lengths) for i, part in enumerate(kind)))
    names = {"kv": ("k", "v"), "window": ("k", "v"), "recurrent": ("s", "conv"), "none": ()}[kind]
    values = [tensors[prefix + name] for name in names]
    if kind == "kv":
        return KV.of(values[0], values[1], lengths)
    return {"window": Window, "recurrent": Recurrent, "none": Nothing}[kind](*values)
