"""What a model is trained on and measured by: one loss, by several rules, without holding all logits at once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.ops.cross_entropy import cross_entropy
from plait.ops.graph import gradient
from plait.ops.kl import kl

IGNORE = -100  # a target that is not scored, as everywhere in the field; so is every other negative one
SLICE = 2**25  # numbers that a rule makes of one slice: 128 MiB of float32
ON_GPU = 4  # times as many where a kernel holds none of them: with every slice the head's gradient is written once more


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """total: the sum over the scored positions, float32 or wider; count: how many they are, on the device; parts: the sums
    that the total is made of, by name."""

    total: Float[Tensor, ""]
    count: Int[Tensor, ""]
    parts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def mean(self) -> Float[Tensor, ""]:
        """Over the scored positions; 0 where there was none."""
        return self.total / self.count.clamp_min(1)

    def plus(self, losses: Mapping[str, Float[Tensor, ""]]) -> "Loss":
        """With the layers' losses, which `mean` grows by: each counts once for every position scored beside it, so that parts
        of a batch, and ranks, add up by what they score."""
        if not losses:
            return self
        if clash := self.parts.keys() & losses.keys():
            raise ValueError(
                f"a layer's loss is named {min(clash)!r}, as a part of the objective is: give it another name"
            )
        sums = {name: value.to(self.total.device) * self.count for name, value in losses.items()}
        parts = {name: value.detach() for name, value in sums.items()}
        return Loss(self.total + sum(sums.values()), self.count, self.parts | parts)


class Rule(Protocol):
    """What outputs are held against. `copies`: how many numbers it holds for each output."""

    copies: int

    def count(self) -> Int[Tensor, ""]:
        """How many positions are scored."""
        ...

    def score(self, y: Float[Tensor, "n o"], rows: slice, gradient: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """The sums over these rows by name, float32 at least, and the gradient of their sum at the outputs y."""
        ...


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """-log p of the targets (b, t), in nats; negative targets are not scored."""

    targets: Int[Tensor, "..."]
    copies = 1

    def count(self) -> Int[Tensor, ""]:
        return (self.targets >= 0).sum()

    def check(self, outputs: int) -> None:
        """Raise ValueError for a target that is no id; on a device, torch's own assertion does."""
        if self.targets.device.type == "cpu" and self.targets.numel() and int(self.targets.max()) >= outputs:
            raise ValueError(f"target {int(self.targets.max())} is outside the model's vocabulary of {outputs}")

    def score(self, y: Tensor, rows: slice, gradient: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        total, dy = cross_entropy(y, self.targets.flatten()[rows].long(), gradient)
        return {"cross_entropy": total}, dy


@dataclass(frozen=True, eq=False)
class KL:
    """KL(teacher || model) of the two distributions at a temperature T, times T^2 (arXiv 1503.02531), from the teacher's
    hidden states (b, t, d') and its head, so that its logits too exist only slice by slice.

    scored: positions that count (b, t); None: all.
    """

    hidden: Float[Tensor, "..."]
    head: Callable[[Tensor], Tensor]
    temperature: float = 1.0
    scored: Bool[Tensor, "..."] | None = None
    copies = 2

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a number above 0, got {self.temperature}")

    def count(self) -> Int[Tensor, ""]:
        if self.scored is not None:
            return self.scored.sum()
        return torch.tensor(self.hidden.shape[:-1].numel(), device=self.hidden.device)

    def check(self, outputs: int) -> None:
        with torch.no_grad():
            theirs = self.head(self.hidden.flatten(0, -2)[:1]).shape[-1]
        if theirs != outputs:
            raise ValueError(
                f"the teacher has a vocabulary of {theirs}, this model one of {outputs}: KL needs equal ones"
            )

    def score(self, y: Tensor, rows: slice, gradient: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        with torch.no_grad():
            theirs = self.head(self.hidden.flatten(0, -2)[rows])
        scored = None if self.scored is None else self.scored.flatten()[rows]
        total, dy = kl(y, theirs, scored, self.temperature, gradient)
        return {"kl": total}, dy


@dataclass(frozen=True, eq=False)
class SquaredError:
    """Mean over the outputs of (y - target)^2, targets (b, t, o). scored: positions that count (b, t); None: all."""

    targets: Float[Tensor, "..."]
    scored: Bool[Tensor, "..."] | None = None
    copies = 1

    def count(self) -> Int[Tensor, ""]:
        if self.scored is not None:
            return self.scored.sum()
        return torch.tensor(self.targets.shape[:-1].numel(), device=self.targets.device)

    def check(self, outputs: int) -> None:
        if self.targets.shape[-1] != outputs:
            raise ValueError(f"targets have {self.targets.shape[-1]} numbers a position, the model gives {outputs}")

    def score(self, y: Tensor, rows: slice, gradient: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        difference = at_least_float32(y) - self.targets.flatten(0, -2)[rows]
        if self.scored is not None:  # whatever stands where nothing is known, NaN too
            difference = difference.masked_fill(self.scored.flatten()[rows, None] == 0, 0.0)
        sums = {"squared_error": difference.square().mean(-1).sum()}
        return sums, difference.mul_(2 / y.shape[-1]) if gradient else None


@dataclass(frozen=True, eq=False)
class Mixed:
    """A weighted sum of rules over the same outputs; what counts is what counts for the first."""

    parts: Sequence[tuple[float, Any]]

    @property
    def copies(self) -> int:
        return 1 + sum(rule.copies for _, rule in self.parts)

    def count(self) -> Int[Tensor, ""]:
        return self.parts[0][1].count()

    def check(self, outputs: int) -> None:
        for _, rule in self.parts:
            rule.check(outputs)

    def score(self, y: Tensor, rows: slice, gradient: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        sums: dict[str, Tensor] = {}
        total: Tensor | None = None
        for weight, rule in self.parts:
            own, dy = rule.score(y, rows, gradient)
            for name, value in own.items():  # rules of one kind, such as KL to two teachers, share a name
                sums[name] = sums.get(name, 0) + weight * value
            if dy is not None:
                total = dy.mul_(weight) if total is None else total.add_(dy, alpha=weight)
        return sums, total


def at_least_float32(x: Tensor) -> Tensor:
    """float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def head_loss(
    hidden: Float[Tensor, "b t d"],
    head: Callable[[Tensor], Tensor],
    weights: Sequence[nn.Parameter],
    outputs: int,
    rule: Any,
) -> Loss:
    """The loss of `head(hidden)` by `rule`, slice by slice. `weights` are the head's parameters that may get gradients."""
    rule.check(outputs)
    learned = [weight for weight in weights if weight.requires_grad]
    size = SLICE * ON_GPU if hidden.is_cuda and isinstance(rule, (CrossEntropy, KL)) else SLICE
    rows = max(1, size // (outputs * rule.copies))
    train = torch.is_grad_enabled()
    total, names, sums = _HeadLoss.apply(hidden.flatten(0, -2), head, rule, rows, train, *learned)
    return Loss(total, rule.count(), dict(zip(names, sums.unbind(), strict=True)))


def loss_of(outputs: Float[Tensor, "b t o"], rule: Any) -> Loss:
    """The loss of outputs that exist already."""
    rule.check(outputs.shape[-1])
    flat = outputs.flatten(0, -2)
    total, names, sums = _HeadLoss.apply(flat, lambda y: y, rule, max(1, len(flat)), torch.is_grad_enabled())
    return Loss(total, rule.count(), dict(zip(names, sums.unbind(), strict=True)))


class _HeadLoss(torch.autograd.Function):
    """Head and rule in one, slice by slice. The gradient at a slice's outputs is known as soon as they are; so it is used at
    once, through whatever the head is made of, and no (tokens, outputs) tensor outlives its slice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "n d"],
        head: Callable[[Tensor], Tensor],
        rule: Any,
        rows: int,
        train: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, tuple[str, ...], Tensor]:
        at_least = torch.promote_types(hidden.dtype, torch.float32)
        sums: dict[str, Tensor] = {}
        dhidden = torch.zeros_like(hidden) if train else None
        dweights = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights if train]
        for first in range(0, max(1, len(hidden)), rows):
            here = slice(first, first + rows)
            h = hidden[here].detach().requires_grad_(train)
            with torch.set_grad_enabled(train):
                y = head(h)
            own, dy = rule.score(y.detach(), here, train)
            sums = {name: sums[name] + value if sums else value for name, value in own.items()}
            if dhidden is not None and dy is not None:
                grads = torch.autograd.grad(y, [h, *weights], dy.to(y.dtype), allow_unused=True)
                dhidden[here] = grads[0]
                for dweight, grad in zip(dweights, grads[1:], strict=True):
                    if grad is not None:
                        dweight += grad
        ctx.save_for_backward(*([dhidden] if dhidden is not None else []), *dweights)
        ctx.dtypes = [w.dtype for w in weights]
        parts = torch.stack(list(sums.values())).to(at_least)
        ctx.mark_non_differentiable(parts)
        return parts.sum(), tuple(sums), parts

    @staticmethod
    @gradient
    def backward(ctx: Any, dtotal: Tensor, *others: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dhidden, *dweights = ctx.saved_tensors
        scaled = ((d * dtotal.to(d.dtype)).to(dtype) for d, dtype in zip(dweights, ctx.dtypes, strict=True))
        return dhidden * dtotal.to(dhidden.dtype), None, None, None, None, *scaled
