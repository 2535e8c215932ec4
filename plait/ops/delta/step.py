"""The gated delta rule for a single token, in as few passes over the state as it takes: it is read once and written once.

S' = a S + e k^T   with   e = b (v - a S k),   o = S' q = a S q + e (k . q)
"""

import torch
from torch import Tensor
from torch.linalg import vecdot

from plait.ops.packing import Packing


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `gated_delta` with t = 1, so packed or not there is one sequence per row."""
    b, _, h, dv = v.shape
    groups, dk = q.shape[2:]
    S = v.new_zeros(b, h, dv, dk) if state is None else state
    heads = (b * groups, h // groups, 1)  # of a group, which share q and k
    a, beta, v = g.exp().view(heads), beta.reshape(heads), v.reshape(*heads[:2], dv)
    both = torch.cat([k, q], 1).transpose(1, 2).reshape(-1, 2, dk)  # (b g, 2, k)
    read = torch.bmm(both, S.reshape(len(both), -1, dk).mT).view(len(both), 2, -1, dv) * a[:, None]
    Sk, Sq = read.unbind(1)  # (b g, h/g, v)
    k, q = both.split_with_sizes((1, 1), 1)
    e = (v - Sk) * beta
    o = torch.addcmul(Sq, e, vecdot(k, q)[..., None])
    if state is None:
        return o.view(b, 1, h, dv), None
    a = a.view(b, h, 1, 1)
    S = (S.mul_(a) if own else S * a).reshape(len(both), -1, dk).addcmul_(e.view(len(both), -1, 1), k)
    return o.view(b, 1, h, dv), state if own else S.view(b, h, dv, dk)
