"""Typed state values. All but KV are plain tensors that no call ever writes to again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

from jaxtyping import Float
from torch import Tensor

from plait.state.kv import KV


@dataclass(frozen=True, eq=False)
class Window:
    """The keys and values that a sliding window still sees, the newest last; entries before position 0 are zero."""

    kind: ClassVar[str] = "window"
    k: Float[Tensor, "b w-1 h k"]
    v: Float[Tensor, "b w-1 h k"]

    def tensors(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v}

    def map(self, change: Callable[[Tensor], Tensor], lengths: tuple[int, ...] | None = None) -> Self:
        return type(self)(change(self.k), change(self.v))


@dataclass(frozen=True, eq=False)
class Recurrent:
    """What a recurrence remembers, at least float32, and the last inputs of the short convolution (w = 1: there is none).

    A matrix (v, k) per head; of a nonlinear recurrence the states of each unit: (b, states, h, k).
    """

    kind: ClassVar[str] = "recurrent"
    s: Float[Tensor, "b h v k"]
    conv: Float[Tensor, "b w-1 d"]

    def tensors(self) -> dict[str, Tensor]:
        return {"s": self.s, "conv": self.conv}

    def map(self, change: Callable[[Tensor], Tensor], lengths: tuple[int, ...] | None = None) -> Self:
        return type(self)(change(self.s), change(self.conv))


def recurrent(s: Tensor | None, conv: Tensor | None) -> Recurrent | None:
    """What the ops of a layer leave behind: a state where they were given one."""
    return None if s is None or conv is None else Recurrent(s, conv)


@dataclass(frozen=True, eq=False)
class Nothing:
    """The state of a layer that has none."""

    kind: ClassVar[str] = "none"

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def map(self, change: Callable[[Tensor], Tensor], lengths: tuple[int, ...] | None = None) -> Self:
        return self


@dataclass(frozen=True, eq=False)
class Branches:
    """One state per branch of a parallel slot, and per layer of a branch."""

    kind: ClassVar[str] = "branches"
    parts: tuple["SlotState", ...]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": x for i, part in enumerate(self.parts) for name, x in part.tensors().items()}

    def map(self, change: Callable[[Tensor], Tensor], lengths: tuple[int, ...] | None = None) -> Self:
        return type(self)(tuple(part.map(change, lengths) for part in self.parts))


SlotState = KV | Window | Recurrent | Nothing | Branches
