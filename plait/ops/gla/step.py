"""The recurrence with a decay per key channel for a single token."""

import torch
from torch import Tensor

from plait.ops.packing import Packing


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    p: Tensor | None = None,
    z: Tensor | None = None,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `gla` and `dplr` with t = 1, so packed or not there is one sequence per row."""
    b, _, h, dv = v.shape
    rows, dk = b * h, k.shape[3]
    q, k, v = q.reshape(rows, dk, 1), k.reshape(rows, 1, dk), v.reshape(rows, dv, 1)
    if state is None:
        return (v * torch.bmm(k, q)).view(b, 1, h, dv), None
    S, a = state.reshape(rows, dv, dk), g.exp().view(rows, 1, dk)
    removed = None if p is None else torch.bmm(S, p.reshape(rows, dk, 1))  # (b h, v, 1)
    S = S.mul_(a) if own else S * a
    if removed is not None and z is None:
        v = v + removed
    elif removed is not None and z is not None:
        v, k = torch.cat([v, removed], 2), torch.cat([k, z.reshape(rows, 1, dk)], 1)
    S = S.baddbmm_(v, k)
    return torch.bmm(S, q).view(b, 1, h, dv), S.view(b, h, dv, dk)
