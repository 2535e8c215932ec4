"""Distillation from a distribution of which only the likeliest ids are known."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from plait.model.loss import at_least_float32


@dataclass(frozen=True, eq=False)
class TopKL:
    """KL(teacher || model) over k ids at each position and all others as one: the teacher's ids there, their ln p, and what it
    gives to the others together. Rounding of ln p is taken out by that: they are made to sum to the rest. No gradient moves
    the others against each other. scored: positions that count."""

    ids: Int[Tensor, "n k"]
    logp: Float[Tensor, "n k"]
    left: Float[Tensor, " n"]
    scored: Bool[Tensor, " n"]
    copies = 2

    def count(self) -> Int[Tensor, ""]:
        return self.scored.sum()

    def check(self, outputs: int) -> None:
        if self.ids.shape[-1] > outputs:
            raise ValueError(f"the teacher's {self.ids.shape[-1]} likeliest ids are more than the model's {outputs}")

    def score(self, y: Tensor, rows: slice, gradient: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        y = at_least_float32(y)
        ids, left = self.ids[rows].long(), self.left[rows].to(y.dtype)
        logp = self.logp[rows].to(y.dtype).log_softmax(-1) + torch.log1p(-left)[:, None]
        p, ours = logp.exp(), y.gather(1, ids) - y.logsumexp(-1, keepdim=True)  # (n, k)
        q = y.softmax(-1)  # (n, v)
        own = q.gather(1, ids)
        q.scatter_(1, ids, 0.0)
        others = q.sum(-1).clamp_min(torch.finfo(y.dtype).tiny)  # what the model gives to them
        scored = self.scored[rows].to(y.dtype)
        rowwise = (p * (logp - ours)).sum(-1) + torch.special.xlogy(left, left / others)
        sums = {"kl": (rowwise * scored).sum()}
        if not gradient:
            return sums, None
        q.mul_(((1 - left / others) * scored)[:, None])
        return sums, q.scatter_(1, ids, (own - p) * scored[:, None])
