"""Products of decays inside a chunk, from their logs."""

import math

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
    to_end = decay_((G[..., -1:] - G).to(g.dtype))
    pairs = decay_((G[..., :, None] - G[..., None, :]).to(g.dtype)).tril_()
    return decay_(G.to(g.dtype)), pairs, to_end


def decay_of(logs: Tensor) -> Tensor:
    """exp(x) for x <= 0, 0 below the floor; differentiable."""
    return torch.where(logs < FLOOR[logs.dtype], 0.0, logs.exp())


def decay_(x: Tensor) -> Tensor:
    """exp(x) in place for x <= 0, 0 below the floor. Infinities would do the same, but exp is slow on them."""
    floor = FLOOR[x.dtype]
    return torch.threshold_(x.clamp_(floor, 0).exp_(), math.exp(floor) * (1 + 1e-6), 0.0)


def from_pairs(dlogP: Float[Tensor, "*n c c"]) -> Float[Tensor, "*n c"]:
    """The gradient of g from that of log P_ij, the sum of g_m over j < m <= i; dlogP is 0 where P is.

    Summed over the pairs that enclose m, all of which count: as a difference of what rows and columns sum to, it
    would drown in their rounding where decays are strong.
    """
    before = torch.ones(dlogP.shape[-2:], dtype=dlogP.dtype, device=dlogP.device).triu_(1)  # [j < m]
    return (dlogP @ before).tril_().sum(-2)


def from_sums(dG: Float[Tensor, "*n c"], dtype: torch.dtype) -> Float[Tensor, "*n c"]:
    """The gradient of g from that of its running sums G: G_i holds g_j for all j <= i.

    What a token gives to G_i and takes from the chunk's last can cancel almost wholly, so dG must be in float64.
    """
    return dG.flip(-1).cumsum(-1).flip(-1).to(dtype)
