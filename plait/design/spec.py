"""What a layer must remember, told without allocating it: names, shapes, dtypes, bytes."""

from dataclasses import dataclass
from math import prod

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a state. `dtype` is a torch dtype's name; `start` holds its first values along axis 1, empty: zeros."""

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


def recurrent_spec(batch: int, matrix: tuple[int, int, int], conv_width: int, channels: int, dtype: str) -> StateSpec:
    """A matrix (heads, v, k) and the convolution's last inputs."""
    s = TensorSpec("s", (batch, *matrix), accumulator(dtype))
    return StateSpec("recurrent", (s, TensorSpec("conv", (batch, conv_width - 1, channels), dtype)))
