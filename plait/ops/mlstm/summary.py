"""What a run of tokens does to any state that stands before it, relative to its own stabiliser."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plait.ops.mlstm.gates import with_m


@dataclass(frozen=True, eq=False)
class Summary:
    """C and n become exp(decay) times themselves, and `final` is added: what the run leads to from nothing, with its m."""

    decay: Float[Tensor, "b h"]
    final: Float[Tensor, "b h v+2 k"]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Self:
        """Of one run of tokens."""
        i, total = i.double(), F.logsigmoid(f.double()).cumsum(1)
        source = i - total
        most = source.amax(1, keepdim=True)
        written = F.pad(v, (0, 1), value=1.0) * (source - most).exp().to(v.dtype)[..., None]
        S = written.permute(0, 2, 3, 1) @ k.transpose(1, 2)  # (b, h, v + 1, k)
        decay = total[:, -1].to(v.dtype)
        return cls(decay, with_m(S, (total[:, -1:] + most)[:, 0]))

    def apply(self, state: Float[Tensor, "b h v+2 k"]) -> Float[Tensor, "b h v+2 k"]:
        """The state after the run from the one before it."""
        before, own = state[:, :, -1, 0] + self.decay, self.final[:, :, -1, 0]
        m = torch.maximum(before, own)
        kept, added = ((x - m).exp()[..., None, None] for x in (before, own))
        return with_m(state[:, :, :-1] * kept + self.final[:, :, :-1] * added, m)

    def combine(self, then: Self) -> Self:
        """The summary of this run and the next one together."""
        return type(self)(self.decay + then.decay, then.apply(self.final))
