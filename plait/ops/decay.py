"""Products of decays inside a chunk, from their logs."""

import torch
from jaxtyping import Float
from torch import Tensor

# Smaller products are set to 0: e^-40 = 4e-18 is below float64's rounding of the term with decay 1 that it is added to,
# and what they become when multiplied further are subnormal numbers, which processors handle a hundred times slower.
FLOOR = -40.0


def chunk_decay(
    g: Float[Tensor, "*n c"],
) -> tuple[Float[Tensor, "*n c"], Float[Tensor, "*n c c"], Float[Tensor, "*n c"]]:
    """Decay from the chunk's start to each token, from token j to token i >= j (0 for j > i), and to the chunk's end.

    Sums run in float64: with strong decays they reach thousands, where a float32 difference has lost the decay of a
    gentle step that follows.
    """
    G = g.double().cumsum(-1)
    to_end = _exp((G[..., -1:] - G).to(g.dtype))
    gap = (G[..., :, None] - G[..., None, :]).to(g.dtype)
    future = torch.ones(gap.shape[-2:], dtype=torch.bool, device=g.device).triu(1)
    pairs = gap.masked_fill((gap < FLOOR) | future, -torch.inf).exp()
    return _exp(G.to(g.dtype)), pairs, to_end


def _exp(x: Tensor) -> Tensor:
    return x.masked_fill(x < FLOOR, -torch.inf).exp()
