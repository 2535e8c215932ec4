"""mLSTM as the scalar-decay recurrence over v and a one beside it, which sums up n."""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops import ssd
from plait.ops.mlstm.gates import divided, last_of, stabilised, with_m
from plait.ops.packing import Packing


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:
    """Shapes as in `mlstm`."""
    m, g, factor = stabilised(i, f, None if state is None else state[:, :, -1, 0], packing)
    written = torch.cat([v * factor[..., None], factor[..., None]], -1)
    start = None if state is None else state[:, :, :-1]
    o, S, *states = ssd.chunked.run(q, k, written, g, state=start, packing=packing, at=at)
    h = divided(o[..., :-1], o[..., -1], m)
    if S is None:
        return h, None
    return h, with_m(S, last_of(m, packing)), *(with_m(x, m[:, at]) for x in states)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `mlstm` with t = 1, so packed or not there is one sequence per row. The row of m goes along, and is then
    written anew."""
    logf = F.logsigmoid(f)
    m0 = torch.zeros_like(i) if state is None else state[:, None, :, -1, 0]
    m = torch.maximum(logf + m0, i)
    factor = (i - m).exp()[..., None]
    written = torch.cat([v * factor, factor, torch.zeros_like(factor)], -1)
    o, S = ssd.step.run(q, k, written, logf + m0 - m, state=state, packing=packing, own=own)
    h = divided(o[..., :-2], o[..., -2], m)
    if S is None:
        return h, None
    if own:
        S[:, :, -1] = m[:, 0, :, None]
        return h, S
    return h, with_m(S[:, :, :-1], m[:, 0])
