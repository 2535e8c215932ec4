"""Products of decays inside a chunk, from their logs."""

import torch
from jaxtyping import Float
from torch import Tensor


def chunk_decay(
    g: Float[Tensor, "*n c"],
) -> tuple[Float[Tensor, "*n c"], Float[Tensor, "*n c c"], Float[Tensor, "*n c"]]:
    """Decay from the chunk's start to each token, from token j to token i >= j (0 for j > i), and to the chunk's end.

    Sums run in float64: with strong decays they reach thousands, where a float32 difference has lost the decay of a
    gentle step that follows.
    """
    G = g.double().cumsum(-1)
    gap = (G[..., :, None] - G[..., None, :]).to(g.dtype)
    future = torch.ones(gap.shape[-2:], dtype=torch.bool, device=g.device).triu(1)
    pairs = gap.masked_fill(future, -torch.inf).exp()
    return G.to(g.dtype).exp(), pairs, (G[..., -1:] - G).to(g.dtype).exp()
