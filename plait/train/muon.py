"""Muon: momentum, orthogonalised, for matrices. Jordan et al. 2024 (kellerjordan.github.io/posts/muon); its update scaled
as AdamW's (arXiv 2502.16982, equation 4), so that one learning rate and one weight decay fit both.

    M = mu M + (1 - mu) G           O = NS5((1 - mu) G + mu M)           W = W - lr (0.2 sqrt(max(rows, columns)) O + decay W)

NS5 is five times X = a X + (b X X^T + c (X X^T)^2) X, from X with Frobenius norm 1. It takes nearly all the time, and it
forgives rounding: all it has to give are singular values near 1. So it runs in whatever the device multiplies fastest.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from plait.ops.instructions import fast_dtype

MOMENTUM = 0.95
A, B, C = 3.4445, -4.7750, 2.0315  # steepest at 0 of the quintics that keep [0, 1] within about 0.7 to 1.2
TIMES = 5
TINY = 1e-7  # a gradient of zeros stays one
AT_ONCE = 2**24  # numbers orthogonalised together: launches cost less, memory stays small beside the weights


class Muon(torch.optim.Optimizer):
    """The same numbers as torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but for the dtype of its products.

    A group's `blocks` says for each parameter how its rows fall into matrices of their own, which are orthogonalised apart:
    the queries', keys' and values' of one fused projection, each expert's gate and up. Without it each parameter is one matrix.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = (
            None  # on the device, as of torch's fused optimizers: where above 0, weights stay
        )

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  (no closure)
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            torch._foreach_mul_(weights, self.kept(1 - group["lr"] * group["weight_decay"], 1.0))
            for equal in alike(self.matrices(group)):
                updates = orthogonal(torch.stack([direction for _, direction in equal]))
                weights = [weight for weight, _ in equal]
                rate = group["lr"] * 0.2 * max(weights[0].shape) ** 0.5
                updates = self.kept(updates, 0.0)
                torch._foreach_add_(weights, [update.to(weights[0].dtype) for update in updates], alpha=-rate)

    def kept(self, value: Any, instead: float) -> Any:
        """`value`, or `instead` where the weights must stay."""
        return value if self.found_inf is None else torch.where(self.found_inf > 0, instead, value)

    def matrices(self, group: dict[str, Any]) -> "list[Pair]":
        """Every matrix of the group, a view into its parameter, and where it is to go."""
        blocks = group.get("blocks") or [(weight.shape[0],) for weight in group["params"]]
        return [
            pair
            for weight, rows in zip(group["params"], blocks, strict=True)
            if weight.grad is not None
            for pair in zip(*(x.flatten(0, -2).split(rows) for x in (weight, self.direction(weight))), strict=True)
        ]

    def direction(self, weight: Tensor) -> Tensor:
        """The gradient, smoothed, and looked ahead of (Nesterov)."""
        assert weight.grad is not None
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        return weight.grad.lerp(state["momentum_buffer"].lerp_(weight.grad, 1 - MOMENTUM), MOMENTUM)


Pair = tuple[Tensor, Tensor]  # a matrix, and its direction


def alike(matrices: list[Pair]) -> Iterator[list[Pair]]:
    """Matrices of equal shape, dtype and device together, as many as may be orthogonalised at once."""

    def kind(pair: Pair) -> tuple[Any, ...]:
        return tuple(pair[0].shape), str(pair[0].dtype), str(pair[0].device)

    for _, group in groupby(sorted(matrices, key=kind), kind):  # sorted() keeps the order of equals: deterministic
        equal = list(group)
        size = max(1, AT_ONCE // equal[0][0].numel())
        yield from (equal[start : start + size] for start in range(0, len(equal), size))


def orthogonal(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(n, rows, columns) -> about U V^T of each one's U S V^T, in `dtype`: the device's fastest unless given."""
    lying = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = lying / lying.norm(dim=(-2, -1), keepdim=True).clamp(min=TINY)
    x = x.to(dtype or fast_dtype(x.device))
    for _ in range(TIMES):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if lying is not matrices else x
