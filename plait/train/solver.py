"""How the solvers of nonlinear recurrences fare, layer by layer (docs/shooting.md)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from plait.layers import Channels
from plait.train.late import Late

STAT = "solver"  # a `plait.ops.shooting.Info`


@dataclass(frozen=True, slots=True)
class SolverRecord:
    """One layer over `calls` calls: `passes` in all of them, the largest `gap`, and in how many it `fell_back` to one token
    after the other."""

    calls: int
    passes: int
    gap: float
    fell_back: int

    @property
    def mean_passes(self) -> float:
        return self.passes / self.calls

    def __add__(self, other: Self) -> "SolverRecord":
        gap = max(self.gap, other.gap)
        return SolverRecord(self.calls + other.calls, self.passes + other.passes, gap, self.fell_back + other.fell_back)


def read(channels: Channels) -> dict[str, SolverRecord]:
    """One call by layer. All layers are read at once, so that a device is waited for only once."""
    return records(Late(channels.stats).read())


def records(stats: Mapping[str, Mapping[str, Any]]) -> dict[str, SolverRecord]:
    """One call by layer, from stats that have been read."""
    found = {address: numbers[STAT] for address, numbers in stats.items() if STAT in numbers}
    return {
        address: SolverRecord(1, int(passes), gap if math.isfinite(gap) else math.inf, int(fell_back))
        for address, (passes, gap, fell_back) in found.items()
    }


def together(one: Mapping[str, SolverRecord], other: Mapping[str, SolverRecord]) -> dict[str, SolverRecord]:
    """The calls of both."""
    return {**one, **{name: one[name] + record if name in one else record for name, record in other.items()}}


def as_data(layers: Mapping[str, SolverRecord]) -> dict[str, dict[str, Any]]:
    """For JSON, by layer: mean passes, worst gap (null where it is not finite), and in how many calls it fell back."""
    return {
        address: {
            "passes": f.passes if f.calls == 1 else round(f.mean_passes, 3),
            "gap": float(f"{f.gap:.3g}") if math.isfinite(f.gap) else None,
            "fell_back": f.fell_back,
        }
        for address, f in layers.items()
    }
