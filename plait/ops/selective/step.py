"""The selective scan for a single token."""

import torch
from torch import Tensor

from plait.ops.packing import Packing


def run(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `selective_scan` with t = 1, so packed or not there is one sequence per row."""
    dt = dt.mT  # (b, d, 1)
    written = dt * x.mT * B
    h = written if state is None else torch.addcmul(written, (dt * A).exp(), state)
    return torch.bmm(h, C.mT).mT, None if state is None else h
