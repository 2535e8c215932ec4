"""Products of decays inside a chunk, from their logs."""

import torch
from jaxtyping import Float
from torch import Tensor

# Smaller products are set to 0. Each is added to a term with decay 1, beside which e^-20 = 2e-9 is a thirtieth of
# float32's rounding, and e^-40 = 4e-18 of float64's. Kept, they would be multiplied with one another down to subnormal numbers,
# which processors handle a hundred times slower: a model with strong decays would train at a fifth of its speed.
FLOOR = {torch.float32: -20.0, torch.float64: -40.0}


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
    pairs = gap.masked_fill((gap < FLOOR[g.dtype]) | future, -torch.inf).exp()
    return _exp(G.to(g.dtype)), pairs, to_end


def _exp(x: Tensor) -> Tensor:
    return x.masked_fill(x < FLOOR[x.dtype], -torch.inf).exp()


def pair_sums(dlogP: Float[Tensor, "*n c c"]) -> Float[Tensor, "*n c"]:
    """The gradient of the running sums G from that of log P_ij = G_i - G_j, in float64: see `from_sums`."""
    return dlogP.sum(-1, dtype=torch.float64) - dlogP.sum(-2, dtype=torch.float64)


def from_sums(dG: Float[Tensor, "*n c"], dtype: torch.dtype) -> Float[Tensor, "*n c"]:
    """The gradient of g from that of its running sums G: G_i holds g_j for all j <= i.

    Where decays are strong, what pairs of tokens give to G_i and take from G_j is far larger than what remains, so dG
    must be in float64 for the rest to survive the sum.
    """
    return dG.flip(-1).cumsum(-1).flip(-1).to(dtype)
