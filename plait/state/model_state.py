"""What a whole model remembers: one typed value per slot, and how many tokens each row has seen."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from plait.design.spec import Leaf, Memories, Memory
from plait.files import write_atomic
from plait.state.values import Branches, State


@dataclass(frozen=True, eq=False)
class ModelState:
    """An immutable value: a model given a state returns a new one, and the old one may be used again.

    `seen` holds `lengths` on the device, for calls that may not depend on a number; `fresh`: no row has seen anything;
    `some_fresh`: some have, and others not.
    """

    slots: tuple[State, ...]
    seen: Int[Tensor, " b"]
    design: str
    fresh: bool = False
    some_fresh: bool = False
    _lengths: list[tuple[int, ...]] = field(default_factory=list)  # once the host knows them

    @classmethod
    def of(cls, slots: tuple[State, ...], lengths: tuple[int, ...], design: str, device: torch.device) -> Self:
        """For rows that have seen `lengths` tokens."""
        begun = any(lengths)
        return cls(slots, torch.tensor(lengths, device=device), design, not begun, begun and 0 in lengths, [lengths])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row has seen."""
        if not self._lengths:
            self._lengths.append(tuple(self.seen.tolist()))
        return self._lengths[0]

    def then(self, slots: tuple[State, ...], counts: Tensor | int, lengths: tuple[int, ...] | None) -> Self:
        """After `counts` more tokens in each row, which makes `lengths` of them where the host counts too."""
        known = [] if lengths is None else [lengths]
        return type(self)(slots, self.seen + counts, self.design, _lengths=known)

    @property
    def batch(self) -> int:
        return self.seen.shape[0]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.seen.device

    @property
    def nbytes(self) -> int:
        """Bytes of what the layers remember, room reserved for further keys included."""
        return sum(x.nbytes for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, such as "3.s"."""
        return Branches(self.slots).tensors()

    def fork(self) -> Self:
        """A copy that shares no memory: both may go on independently."""
        return replace(self, slots=tuple(slot.map(torch.clone) for slot in self.slots))

    def detach(self) -> Self:
        """The same values cut off from their gradients, for truncated backpropagation through time."""
        return replace(self, slots=tuple(slot.map(torch.detach) for slot in self.slots))

    def to(self, device: str | torch.device) -> Self:
        """A copy on another device."""
        slots = tuple(slot.map(lambda x: x.to(device, copy=True)) for slot in self.slots)
        return replace(self, slots=slots, seen=self.seen.to(device))

    def select(self, rows: Sequence[int] | Tensor | np.ndarray) -> Self:
        """A copy of some rows, in the order given; a row may be taken more than once. Rows are whole numbers, in any kind of
        sequence or a tensor, or a mask: one bool for each row, true for those to keep."""
        picked = _row_numbers(rows, self.batch)
        lengths = tuple(self.lengths[row] for row in picked)

        def pick(x: Tensor) -> Tensor:
            return x[torch.tensor(picked, dtype=torch.int64, device=x.device)]

        return self.of(tuple(slot.map(pick, lengths) for slot in self.slots), lengths, self.design, self.device)

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """One state with the rows of all, in order. It shares memory with none of them unless there is only one. Raises
        ValueError for states of unlike designs."""
        designs = {state.design for state in states}
        if len(designs) != 1:
            which = f"got those of {' and '.join(sorted(designs))}" if designs else "got none"
            raise ValueError(f"join takes one state or more, all of one design; {which}")
        if len(states) == 1:
            return states[0]
        lengths = tuple(length for state in states for length in state.lengths)
        slots = tuple(_join(parts, lengths) for parts in zip(*(state.slots for state in states), strict=True))
        return cls.of(slots, lengths, states[0].design, states[0].device)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, atomically, with the hash of the design that it belongs to."""
        tensors = {
            name: x.detach().contiguous() for name, x in self.detach().tensors().items()
        }  # raises where keys are stale
        metadata = {
            "format": "plait-state",
            "design": self.design,
            "lengths": json.dumps(self.lengths),
            "slots": json.dumps([_kinds(slot) for slot in self.slots]),
        }
        write_atomic(Path(path), lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read what `save` wrote; the model that gets the state refuses it if the design differs."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such state file")
        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                # copies lie where torch lays its tensors: products of those at odd places in a file end in other digits
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a readable state file ({error}); it may be cut short") from None
        if metadata.get("format") != "plait-state":
            raise ValueError(f"{path}: a safetensors file, but not a state written by ModelState.save")
        lengths = tuple(json.loads(metadata["lengths"]))
        kinds = json.loads(metadata["slots"])
        slots = tuple(_restore(kind, f"{i}.", tensors, lengths) for i, kind in enumerate(kinds))
        return cls.of(slots, lengths, metadata["design"], torch.device(device))


def remember(memory: Memory | Memories, lengths: tuple[int, ...], make: Callable[[Leaf], Tensor]) -> State:
    """A value for what a layer has declared, every leaf `make`n."""
    if isinstance(memory, Memories):
        return Branches(tuple(remember(part, lengths, make) for part in memory.parts))
    return State.kinds[memory.kind].of({leaf.name: make(leaf) for leaf in memory.leaves}, lengths)


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


def _kinds(slot: State) -> Any:
    return [_kinds(part) for part in slot.parts] if isinstance(slot, Branches) else slot.kind


def _restore(kind: Any, prefix: str, tensors: dict[str, Tensor], lengths: tuple[int, ...]) -> State:
    if isinstance(kind, list):
        return Branches(tuple(_restore(part, f"{prefix}{i}.", tensors, lengths) for i, part in enumerate(kind)))
    mine = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    return State.kinds[kind].of(mine, lengths)


def _join(parts: Sequence[State], lengths: tuple[int, ...]) -> State:
    first = parts[0]
    if isinstance(first, Branches):
        inside = zip(*(part.parts for part in parts if isinstance(part, Branches)), strict=True)
        return Branches(tuple(_join(inner, lengths) for inner in inside))
    each = [part.map(lambda x: x).tensors() for part in parts]  # raises where keys are stale
    return type(first).of({name: _rows([tensors[name] for tensors in each]) for name in first.tensors()}, lengths)


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenated over rows; buffers of unequal capacity get zeros behind."""
    longest = max(x.shape[1] for x in tensors)
    return torch.cat([F.pad(x, (0, 0) * (x.ndim - 2) + (0, longest - x.shape[1])) for x in tensors])
