"""What a layer must remember, declared without allocating it: names, shapes, dtypes, how it is kept, bytes."""

from dataclasses import dataclass
from math import prod
from typing import Literal

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Leaf:
    """One thing that a layer remembers of every row.

    keep: "one" value, moved on by every token (a recurrent matrix); the `int` last tokens, a value each (a window, the tail of
    a convolution); or "all" tokens, a value each (keys). shape: of one value. dtype: a torch dtype's name. start: its first
    values along the first axis, empty: zeros. prefix: beside the last n tokens the first so many are kept, in front of them.
    ring: in a pool the last n tokens lie in a ring of n + 1 places or more, not in order: writing one then moves no other.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    keep: int | Literal["one", "all"] = "one"
    start: tuple[float, ...] = ()
    ring: bool = False
    prefix: int = 0

    def sized(self, batch: int, length: int) -> "TensorSpec":
        """The tensor of `batch` rows of `length` tokens."""
        if isinstance(self.keep, int):
            tokens: tuple[int, ...] = (self.prefix + self.keep,)
        else:
            tokens = (length,) if self.keep == "all" else ()
        return TensorSpec(self.name, (batch, *tokens, *self.shape), self.dtype, self.start)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a layer remembers: the kind of value (a class of `plait.state` holds its leaves by name) and its leaves."""

    kind: str = "none"
    leaves: tuple[Leaf, ...] = ()

    def sized(self, batch: int, length: int) -> "StateSpec":
        return StateSpec(self.kind, tuple(leaf.sized(batch, length) for leaf in self.leaves))


@dataclass(frozen=True, slots=True)
class Memories:
    """Those of a chain, a parallel slot, or a whole design."""

    parts: tuple["Memory | Memories", ...]

    def sized(self, batch: int, length: int) -> "StateSpec":
        return StateSpec("branches", branches=tuple(part.sized(batch, length) for part in self.parts))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a state, its rows first. `start` holds its first values along axis 1, empty: zeros."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: tuple[float, ...] = ()

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class StateSpec:
    """The state of one slot: the kind of value and its tensors. Channel mixers have kind "none" and no tensors."""

    kind: str
    tensors: tuple[TensorSpec, ...] = ()
    branches: tuple["StateSpec", ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors) + sum(branch.nbytes for branch in self.branches)


def accumulator(dtype: str) -> str:
    """The dtype of what accumulates (recurrent states, decays, norms) in a model of `dtype`: at least float32."""
    return "float64" if dtype == "float64" else "float32"


def recurrent(
    shape: tuple[int, int, int], conv_width: int, channels: int, dtype: str, start: tuple[float, ...] = ()
) -> Memory:
    """A recurrent state (heads, v, k) or (states, heads, k), and the last inputs of a convolution over `channels`."""
    tail = Leaf("conv", (channels,), dtype, keep=conv_width - 1)
    return Memory("recurrent", (Leaf("s", shape, accumulator(dtype), start=start), tail))
