"""The scalar-decay recurrence, one token after the other: the definition."""

import torch
from torch import Tensor

from plait.ops.packing import Packing, each_document


def run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, state: Tensor | None, packing: Packing | None, own: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `ssd`."""
    if packing is not None:
        return each_document(_loop, (q, k, v, g), state, packing)
    return _loop(q, k, v, g, state)


def _loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    b, t, h, dv = v.shape
    S = v.new_zeros(b * h, dv, k.shape[-1]) if state is None else state.flatten(0, 1)  # (b h, v, k)
    q, k = (x.repeat_interleave(h // x.shape[2], 2).transpose(1, 2).flatten(0, 1) for x in (q, k))
    v = v.transpose(1, 2).flatten(0, 1)  # (b h, t, v)
    a = g.exp().transpose(1, 2).flatten(0, 1)[..., None, None]  # (b h, t, 1, 1)
    outputs = []
    for i in range(t):
        S = torch.baddbmm(a[:, i] * S, v[:, i, :, None], k[:, i, None, :])
        outputs.append(S @ q[:, i, :, None])
    o = torch.stack(outputs, 1).squeeze(-1)  # (b h, t, v)
    o = o.unflatten(0, (b, h)).transpose(1, 2)
    return o, None if state is None else S.unflatten(0, (b, h))
