"""The elementwise recurrence, one token after the other: the definition."""

import torch
from torch import Tensor

from plait.ops.packing import Packing, each_document


def run(
    a: Tensor, b: Tensor, *, state: Tensor | None, packing: Packing | None, own: bool = False, at: Tensor | None = None
) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:
    """Shapes as in `scan`."""
    if packing is not None:
        return each_document(_loop, (a, b), state, packing)
    states, last = _loop(a, b, state)
    return (states, last) if at is None else (states, last, states[:, at])


def _loop(a: Tensor, b: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    s, states = b.new_zeros(b[:, 0].shape) if state is None else state, []
    for i in range(b.shape[1]):
        s = a[:, i] * s + b[:, i]
        states.append(s)
    return torch.stack(states, 1), None if state is None else s
