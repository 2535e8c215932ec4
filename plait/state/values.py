"""Typed state values. All but what is appended to (`plait.state.kv`) are plain tensors that no call ever writes to again.

A kind of value is a class here or beside it, named as in the `Memory` that layers declare, with a field for each leaf. All
else - starting, copying, joining, files, pools - works by that declaration alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Self

from jaxtyping import Float
from torch import Tensor


class State:
    """What a layer remembers: one tensor for each leaf that it has declared."""

    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type["State"]]] = {}

    def __init_subclass__(cls) -> None:
        if cls.kind:
            State.kinds[cls.kind] = cls

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], lengths: tuple[int, ...]) -> Self:
        """From tensors by leaf, for rows that have seen `lengths` tokens."""
        return cls(**tensors)

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]  # all are dataclasses

    def map(self, change: Callable[[Tensor], Tensor], lengths: tuple[int, ...] | None = None) -> Self:
        """The same with every tensor `change`d; `lengths`: of its rows, where others are left."""
        return type(self)(*(change(x) for x in self.tensors().values()))


@dataclass(frozen=True, eq=False)
class Window(State):
    """The keys and values that a sliding window still sees, the newest last, behind those of p tokens that it sees for good;
    entries before position 0, and of first tokens that are not there yet, are zero."""

    kind: ClassVar[str] = "window"
    k: Float[Tensor, "b p+w-1 h k"]
    v: Float[Tensor, "b p+w-1 h k"]


@dataclass(frozen=True, eq=False)
class Recurrent(State):
    """What a recurrence remembers, at least float32, and the last inputs of the short convolution (w = 1: there is none).

    A matrix (v, k) per head; of a nonlinear recurrence the states of each unit: (b, states, h, k).
    """

    kind: ClassVar[str] = "recurrent"
    s: Float[Tensor, "b h v k"]
    conv: Float[Tensor, "b w-1 d"]


@dataclass(frozen=True, eq=False)
class Shifted(State):
    """The last inputs of a short convolution (w = 2: of a layer that reads each token beside the one before it) and nothing
    else."""

    kind: ClassVar[str] = "shifted"
    conv: Float[Tensor, "b w-1 d"]


def recurrent(s: Tensor | None, conv: Tensor | None) -> Recurrent | None:
    """What the ops of a layer leave behind: a state where they were given one."""
    return None if s is None or conv is None else Recurrent(s, conv)


@dataclass(frozen=True, eq=False)
class Nothing(State):
    """The state of a layer that has none."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True, eq=False)
class Branches(State):
    """One state per branch of a parallel slot, and per layer of a branch."""

    kind: ClassVar[str] = "branches"
    parts: tuple[State, ...]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": x for i, part in enumerate(self.parts) for name, x in part.tensors().items()}

    def map(self, change: Callable[[Tensor], Tensor], lengths: tuple[int, ...] | None = None) -> Self:
        return type(self)(tuple(part.map(change, lengths) for part in self.parts))


SlotState = State
