"""mLSTM, one token after the other: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.mlstm.gates import EPS, LARGEST
from plait.ops.packing import Packing, each_document


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
    if packing is not None:
        return each_document(_loop, (q, k, v, i, f), state, packing)
    h, S, states = _all(q, k, v, i, f, state)
    return (h, S) if at is None else (h, S, torch.stack(states, 1)[:, at])


def _loop(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return _all(q, k, v, i, f, state)[:2]


def _all(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Outputs, the last state where one was given, and the state after every token."""
    b, t, heads, dv = v.shape
    state_ = v.new_zeros(b, heads, dv + 2, k.shape[-1]) if state is None else state
    S, m = state_[:, :, :-1].flatten(0, 1), state_[:, :, -1, 0].double()  # (b h, v + 1, k): C and n
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (b h, t, k | v)
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    i, logf = i.double(), F.logsigmoid(f.double())  # (b, t, h)
    outputs, states = [], []
    for j in range(t):
        before, m = logf[:, j] + m, torch.maximum(logf[:, j] + m, i[:, j])
        forget, write = ((x - m).exp().to(S.dtype).view(-1, 1, 1) for x in (before, i[:, j]))
        S = torch.baddbmm(forget * S, write * v[:, j, :, None], k[:, j, None, :])
        num, den = (S @ q[:, j, :, None]).squeeze(-1).split([dv, 1], -1)
        bound = (-m).clamp(max=LARGEST[S.dtype]).exp().to(S.dtype).view(-1, 1)
        outputs.append(num / (torch.maximum(den.abs(), bound) + EPS))
        row = m.to(S.dtype)[..., None, None].expand(b, heads, 1, S.shape[-1])
        states.append(torch.cat([S.unflatten(0, (b, heads)), row], 2))
    h = torch.stack(outputs, 1).unflatten(0, (b, heads)).transpose(1, 2)  # (b, t, h, v)
    return h, None if state is None else states[-1], states
