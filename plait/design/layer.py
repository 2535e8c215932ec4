"""What all layer configs share."""

from typing import Self

from plait.design.spec import StateSpec
from plait.design.struct import Struct


class Layer(Struct, frozen=True, kw_only=True):
    """What all layers share. `shared`: every slot with this letter uses the same weights (state is never shared)."""

    shared: bool = False

    def resolve(self, dim: int) -> Self:
        """The same config with every derived number filled in for a model of width `dim`."""
        return self

    def parameters(self, dim: int) -> int:
        raise NotImplementedError

    def flops(self, dim: int, context: int) -> int:
        """Forward matrix-multiply FLOPs for one token that sees `context` tokens (2 per multiply-add)."""
        raise NotImplementedError

    def state(self, dim: int, batch: int, length: int, dtype: str) -> StateSpec:
        """What `batch` sequences of `length` tokens leave behind in a model of `dtype`."""
        return StateSpec("none")


def told(number: int | None) -> int:
    """A number that `resolve` has filled in."""
    assert number is not None, "resolve(dim) first"
    return number


def default_head_dim(dim: int, layer: str) -> int:
    """64, as most small published models; 128 from width 512 on where it divides."""
    if dim % 64:
        raise ValueError(f"{layer}: dim {dim} is not a multiple of 64, so heads and head_dim must be given")
    return 128 if dim >= 512 and dim % 128 == 0 else 64
