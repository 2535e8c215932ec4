"""What a run of tokens does to any state that stands before it, so that runs may be worked on apart: on several devices, each
gives its summary on, and starts from those before it (context parallelism)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from plait.ops.kernels import cast, full_precision


@dataclass(frozen=True, eq=False)
class Summary:
    """Of a linear recurrence: S becomes S A + F. `transition` A is a number, a diagonal or a matrix per head, `final` F the
    state that the run leads to from zero."""

    transition: Float[Tensor, "b h *kk"]
    final: Float[Tensor, "b h v k"]

    def apply(self, state: Float[Tensor, "b h v k"]) -> Float[Tensor, "b h v k"]:
        """The state after the run from the one before it."""
        return self._moved(state) + self.final

    def combine(self, then: Self) -> Self:
        """The summary of this run and the next one together."""
        A = then._moved(self.transition) if then.transition.ndim == 4 else self.transition * then.transition
        return type(self)(A, then.apply(self.final))

    def _moved(self, x: Float[Tensor, "b h n k"]) -> Float[Tensor, "b h n k"]:
        """x A."""
        with full_precision(x.device):
            if self.transition.ndim == 4:
                return x @ self.transition
            return x * (
                self.transition[..., None, :] if self.transition.ndim == 3 else self.transition[..., None, None]
            )


@dataclass(frozen=True, eq=False)
class Elementwise:
    """Of an elementwise recurrence: s becomes A s + F."""

    transition: Float[Tensor, "b *u"]
    final: Float[Tensor, "b *u"]

    def apply(self, state: Float[Tensor, "b *u"]) -> Float[Tensor, "b *u"]:
        """The state after the run from the one before it."""
        return torch.addcmul(self.final, self.transition, state)

    def combine(self, then: Self) -> Self:
        """The summary of this run and the next one together."""
        return type(self)(self.transition * then.transition, then.apply(self.final))


def of_matrices(run: Callable[[Tensor, Tensor], Tensor], v: Float[Tensor, "b t h v"], keys: int) -> Summary:
    """Of a recurrence whose transition is a matrix: the identity, with nothing written to it, goes to the transition, beside
    the state that starts from zero. `run(values, state)` gives the last state."""
    (b, t, h, dv), like = v.shape, {"dtype": v.dtype, "device": v.device}
    identity = torch.eye(keys, **like).expand(b, h, keys, keys)
    state = torch.cat([torch.zeros(b, h, dv, keys, **like), identity], 2)
    last = run(torch.cat([v, torch.zeros(b, t, h, keys, **like)], 3), state)
    final, transition = last.split_with_sizes((dv, keys), 2)
    return Summary(transition, final)


@dataclass(frozen=True, eq=False)
class Tail:
    """Of a convolution: the last inputs of the run, no more of them than it looks back at."""

    last: Float[Tensor, "b n d"]
    count: int  # of inputs that it looks back at

    def apply(self, state: Float[Tensor, "b count d"]) -> Float[Tensor, "b count d"]:
        """The state after the run from the one before it."""
        return self._last(torch.cat([state, cast(self.last, state.dtype)], 1))

    def combine(self, then: Self) -> Self:
        """The summary of this run and the next one together."""
        return type(self)(self._last(torch.cat([self.last, then.last], 1)), self.count)

    def _last(self, x: Tensor) -> Tensor:
        return x.narrow(1, max(0, x.shape[1] - self.count), min(self.count, x.shape[1]))
