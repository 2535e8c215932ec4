"""The scalar-decay recurrence for a single token; heads of one group share q and k, so their states are one tall matrix."""

import torch
from torch import Tensor

from plait.ops.packing import Packing


def run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, state: Tensor | None, packing: Packing | None, own: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `ssd` with t = 1, so packed or not there is one sequence per row."""
    b, _, h, dv = v.shape
    rows, dk = b * q.shape[2], q.shape[3]
    if state is None:
        S = v.new_zeros(b, h, dv, dk)
    else:
        a = g.exp().view(b, h, 1, 1)
        S = state.mul_(a) if own else state * a
    S = S.reshape(rows, -1, dk).addcmul_(v.reshape(rows, -1, 1), k.reshape(rows, 1, dk))  # (b g, h/g v, k)
    o = torch.bmm(q.reshape(rows, 1, dk), S.mT).view(b, 1, h, dv)
    return o, state if own or state is None else S.view(b, h, dv, dk)
