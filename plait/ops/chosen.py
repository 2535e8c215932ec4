"""States after chosen tokens of a linear recurrence in chunks: that before the token's chunk, and what came to it since."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def states_at(
    at: Int[Tensor, " m"],
    batch: int,
    length: int,
    k: Float[Tensor, "n g c k"],
    v: Float[Tensor, "n h c v"],
    a: Float[Tensor, "n h c"],
    P: Float[Tensor, "n h c c"],
    before: Float[Tensor, "n h v k"],
) -> Float[Tensor, "b m h v k"]:
    """S_i = a_i S + sum_j P_ij v_j k_j^T for token i of a chunk; v is what is written. n chunks in the order of `Chunks`,
    of `batch` rows of `length` tokens."""
    c, groups = v.shape[2], k.shape[1]
    if length < c:  # the one chunk of a draft is mostly padding
        k, v, P = k[:, :, :length], v[:, :, :length], P[..., :length]
    chunk = ((at // c) * batch + torch.arange(batch, device=at.device)[:, None]).flatten()  # (b m)
    place = (at % c).repeat(batch)
    written = v[chunk] * P[chunk, :, place][..., None]  # (b m, h, c, v), nothing after the token
    written = written.unflatten(1, (groups, -1)).transpose(3, 4).flatten(2, 3) @ k[chunk]  # (b m, g, h/g v, k)
    old = before[chunk]
    states = torch.addcmul(written.view(old.shape), old, a[chunk, :, place][..., None, None])
    return states.unflatten(0, (batch, -1))
