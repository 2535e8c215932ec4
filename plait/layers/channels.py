"""What layers send out of a call beside their output: losses, numbers about it, and activations to whoever listens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Reduction = Literal["max", "sum"]
Listener = Callable[[Tensor], Tensor | None]  # what it returns stands in for what it was given; None: nothing does
Place = tuple[str, str]  # a layer's path in its slot, and a name

JOIN: dict[Reduction, Callable[[Tensor, Tensor], Tensor]] = {"max": torch.maximum, "sum": torch.add}


@dataclass(eq=False)
class Outbox:
    """What the layers of one slot have sent in one call, each under its path in the slot.

    Nothing in here knows which slot that is, so that equal slots are one graph to torch.compile.
    """

    listeners: Mapping[Place, Listener] = field(default_factory=dict)
    losses: list[tuple[Place, Tensor]] = field(default_factory=list)
    stats: list[tuple[Place, Any, Reduction]] = field(default_factory=list)
    taps: list[Place] = field(default_factory=list)  # that came by, where anyone listens

    def tap(self, place: Place, x: Tensor) -> Tensor:
        """x as its listener wants it."""
        if not self.listeners:
            return x
        self.taps.append(place)
        listener = self.listeners.get(place)
        instead = None if listener is None else listener(x)
        if instead is None:
            return x
        if not isinstance(instead, Tensor) or instead.shape != x.shape:  # sums would stretch it
            raise ValueError(
                f"a listener to {place[1]!r} gives {_what(x)}, or None for no change; got {_what(instead)}"
            )
        return instead


@dataclass(eq=False)
class Channels:
    """What the layers of the calls that it is given to send, by address and name: `model(tokens, channels=Channels())`.

    losses: scalars, weighted already by the layer's config, at least float32, with gradients; a slot that is used twice counts
    twice. Only where gradients are taken: they are there to be learned from.
    stats: tensors, or NamedTuples of them, without gradients. Over calls, parts of a batch and ranks they are reduced as
    `reductions` says of their name.
    """

    losses: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    stats: dict[str, dict[str, Any]] = field(default_factory=dict)
    reductions: dict[str, Reduction] = field(default_factory=dict)

    def take(self, sent: Outbox, addresses: Mapping[str, str]) -> None:
        """What one slot has sent; `addresses` by path. Raises ValueError for what is no loss or no stat."""
        seen = set()
        for place, value in sent.losses:
            address, name = addresses[place[0]], place[1]
            if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
                raise ValueError(
                    f"{address}: loss {name!r} must be a tensor of one floating point number, got {_what(value)}"
                )
            if place in seen:
                raise ValueError(
                    f"{address}: loss {name!r} was sent twice in one call; add the two, or give them two names"
                )
            seen.add(place)
            self._add_loss(address, name, value.to(torch.promote_types(value.dtype, torch.float32)))
        for (path, name), value, reduction in sent.stats:
            if not isinstance(value, Tensor) and not (
                isinstance(value, tuple) and all(isinstance(v, Tensor) for v in value)
            ):
                raise ValueError(
                    f"{addresses[path]}: stat {name!r} must be a tensor or a NamedTuple of them, got {_what(value)}"
                )
            self._add_stat(addresses[path], name, each(Tensor.detach, value), reduction)

    def join(self, other: "Channels") -> None:
        """What other calls have sent."""
        for address, losses in other.losses.items():
            for name, value in losses.items():
                self._add_loss(address, name, value)
        for address, stats in other.stats.items():
            for name, value in stats.items():
                self._add_stat(address, name, value, other.reductions[name])

    def losses_by_name(self) -> dict[str, Tensor]:
        """Their sums over the layers."""
        total: dict[str, Tensor] = {}
        for losses in self.losses.values():
            for name, value in losses.items():
                total[name] = total[name] + value if name in total else value
        return total

    def over_layers(self, name: str) -> Any:
        """A stat reduced over all layers that have it; None where none has."""
        found = [stats[name] for stats in self.stats.values() if name in stats]
        total = found[0] if found else None
        for value in found[1:]:
            total = each(JOIN[self.reductions[name]], total, value)
        return total

    def _add_loss(self, address: str, name: str, value: Tensor) -> None:
        losses = self.losses.setdefault(address, {})
        losses[name] = losses[name] + value if name in losses else value

    def _add_stat(self, address: str, name: str, value: Any, reduction: Reduction) -> None:
        if reduction not in JOIN:
            raise ValueError(
                f"{address}: stat {name!r} is to be reduced by {reduction!r}; expected one of {', '.join(JOIN)}"
            )
        if self.reductions.setdefault(name, reduction) != reduction:
            raise ValueError(
                f"{address}: stat {name!r} is reduced by {reduction!r} here, by {self.reductions[name]!r} elsewhere"
            )
        stats = self.stats.setdefault(address, {})
        stats[name] = each(JOIN[reduction], stats[name], value) if name in stats else value


def send(out: Outbox, addresses: Mapping[str, str], channels: Channels | None) -> None:
    """Hand on what a slot has sent, `addresses` by path in it. Raises ValueError for a listener that nothing came by."""
    for path, name in out.listeners:
        if (path, name) not in out.taps:
            known = sorted({tap for there, tap in out.taps if there == path})
            raise ValueError(f"{addresses[path]} has no tap {name!r}; it has {', '.join(known)}")
    if channels is not None:
        channels.take(out, addresses)


def each(function: Callable[..., Any], *values: Any) -> Any:
    """`function` of tensors, or of the fields of NamedTuples one by one."""
    if isinstance(values[0], tuple):
        return type(values[0])(*(function(*fields) for fields in zip(*values, strict=True)))
    return function(*values)


def _what(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
