"""The elementwise recurrence for a single token."""

import torch
from torch import Tensor

from plait.ops.packing import Packing


def run(
    a: Tensor, b: Tensor, *, state: Tensor | None, packing: Packing | None, own: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `scan` with t = 1, so packed or not there is one sequence per row."""
    if state is None:
        return b, None
    s = torch.addcmul(b[:, 0], a[:, 0], state)
    return s[:, None], s
