"""The gated delta rule in chunks (arXiv 2412.06464, section 3.3): matrix products inside a chunk, a loop over chunks.

With G the running sum of g inside a chunk, the tokens' corrected values solve a unit lower triangular system,
(I + A) U = diag(beta) V with A_ij = beta_i exp(G_i - G_j) k_i . k_j for j < i, and likewise W for the part that the
state before the chunk contributes. Then only U - W S^T and S pass from chunk to chunk.
"""

import torch
from torch import Tensor

from plait.ops.decay import chunk_decay
from plait.ops.packing import Packing, chunks

SIZE = 64  # tokens in a chunk: products of 64 x 64 fill a core's vector units, and the triangular solve stays small


def run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `gated_delta`, q and k with h heads."""
    b, t, h, dv = v.shape
    layout = chunks(b, t, SIZE, packing)
    q, k, v, g, beta = (layout.split(x).flatten(0, 1) for x in (q, k, v, g, beta))  # (n h, c, ...)
    to_token, pairs, to_end = chunk_decay(g)  # (n h, c), (n h, c, c), (n h, c)

    kk = (k * beta[..., None]) @ k.mT  # (n h, c, c)
    A = (kk * pairs).tril(-1)
    rhs = torch.cat([v * beta[..., None], k * (beta * to_token)[..., None]], -1)
    U, W = torch.linalg.solve_triangular(A, rhs, upper=False, unitriangular=True).split([dv, k.shape[-1]], -1)

    rows = [alive * h for alive in layout.alive]
    S = v.new_zeros(rows[0], dv, k.shape[-1]) if state is None else layout.sort(state).flatten(0, 1)
    before, corrected = [], []
    keys = (k * to_end[..., None]).split(rows)
    total = to_token[:, -1, None, None].split(rows)
    for u, w, key, decay in zip(U.split(rows), W.split(rows), keys, total, strict=True):
        live, done = S[: len(u)], S[len(u) :]
        u = torch.baddbmm(u, w, live.mT, alpha=-1)  # (rows, c, v)
        before.append(live)
        corrected.append(u)
        live = torch.baddbmm(live * decay, u.mT, key)
        S = live if len(done) == 0 else torch.cat([live, done])
    o = torch.baddbmm((q @ k.mT * pairs) @ torch.cat(corrected), q * to_token[..., None], torch.cat(before).mT)
    final = None if state is None else layout.unsort(S.unflatten(0, (-1, h)))
    return layout.join(o.unflatten(0, (-1, h))), final
