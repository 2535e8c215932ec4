"""The scalar-decay recurrence in chunks (arXiv 2405.21060, section 6): attention-like products inside a chunk, and a
loop over chunks that only scales and adds states. Heads of one group share q and k, so their products are one."""

import torch
from torch import Tensor

from plait.ops.decay import chunk_decay
from plait.ops.packing import Packing, chunks

SIZE = 64


def run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `ssd`."""
    b, t, h, dv = v.shape
    groups, dk = k.shape[2:]
    layout = chunks(b, t, SIZE, packing)
    q, k, v, g = (layout.split(x) for x in (q, k, v, g))  # (n, g, c, k), (n, h, c, v), (n, h, c)
    n = len(v)
    to_token, pairs, to_end = chunk_decay(g)  # (n, h, c), (n, h, c, c), (n, h, c)

    def per_group(x: Tensor) -> Tensor:  # (n, h, c, v) -> (n g, c, h/g v)
        return x.unflatten(1, (groups, -1)).transpose(2, 3).reshape(n * groups, SIZE, -1)

    scores = (q @ k.mT)[:, :, None] * pairs.unflatten(1, (groups, -1))  # (n, g, h/g, c, c)
    o = scores.flatten(0, 2) @ v.flatten(0, 1)  # (n h, c, v)

    written = per_group(v * to_end[..., None]).mT @ k.flatten(0, 1)  # (n g, h/g v, k)
    written = written.reshape(n, h, dv, dk)
    S = v.new_zeros(layout.alive[0], h, dv, dk) if state is None else layout.sort(state)
    before = []
    for new, decay in zip(written.split(layout.alive), to_token[..., -1, None, None].split(layout.alive), strict=True):
        live, done = S[: len(new)], S[len(new) :]
        before.append(live)
        live = torch.addcmul(new, live, decay)
        S = live if len(done) == 0 else torch.cat([live, done])
    earlier = torch.cat(before).reshape(n * groups, -1, dk)  # (n g, h/g v, k)
    read = (q.flatten(0, 1) @ earlier.mT).view(n, groups, SIZE, -1, dv).transpose(2, 3)  # (n, g, h/g, c, v)
    o = torch.addcmul(o.view(n, h, SIZE, dv), read.flatten(1, 2), to_token[..., None])
    return layout.join(o), None if state is None else layout.unsort(S)
