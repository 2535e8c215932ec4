"""What a whole model remembers: one typed value per slot, and how many tokens each row has seen."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

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

    def select(self, rows: Sequence[int]) -> Self:
        """A copy of some rows, in the order given; a row may be taken more than once."""
        for row in rows:
            if not -self.batch <= row < self.batch:
                raise ValueError(f"row {row} does not exist; the state has {self.batch} rows")
        if not rows:
            raise ValueError("select needs at least one row")
        lengths = tuple(self.lengths[row] for row in rows)

        def pick(x: Tensor) -> Tensor:
            return x[torch.tensor([row % self.batch for row in rows], device=x.device)]

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
