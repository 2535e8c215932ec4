"""The recurrence token by token: the definition."""

import torch
from torch import Tensor

from plait.ops.packing import Packing
from plait.ops.shooting.cells import Bound


def run(cell: Bound, x: Tensor, h0: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """x (b, t, g, h, k), h0 (n, s, h, k) -> every state (b, t, s, h, k), and the last of each sequence (n, s, h, k)."""
    if packing is not None:
        documents = [
            run(cell, x[:, start:end], h0[row : row + 1], None) for row, (start, end) in enumerate(packing.bounds)
        ]
        return torch.cat([states for states, _ in documents], 1), torch.cat([final for _, final in documents])
    s, states = h0, []
    for token in x.unbind(1):
        s = cell.step(token, s)
        states.append(s)
    return torch.stack(states, 1), s
