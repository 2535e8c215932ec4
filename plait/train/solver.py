"""How the solvers of nonlinear recurrences fare, layer by layer (docs/shooting.md)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from plait.ops.shooting import Info

Stats = dict[str, Any]  # what a call of the model leaves: `stats[address]["solver"]` is an Info


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


def read(stats: Stats) -> dict[str, SolverRecord]:
    """One call by layer. All layers are read at once, so that a device is waited for only once."""
    infos = _infos(stats)
    if not infos:
        return {}
    numbers = torch.stack([number.float() for info in infos.values() for number in info]).view(-1, 3).tolist()
    return {
        address: SolverRecord(1, int(passes), gap if math.isfinite(gap) else math.inf, int(fell_back))
        for address, (passes, gap, fell_back) in zip(infos, numbers, strict=True)
    }


def worst(total: Stats, part: Stats) -> None:
    """Join the stats of a part of a batch to those of the parts before it, as if they had been one call; on the device."""
    for address, info in _infos(part).items():
        before = total.setdefault(address, {}).setdefault("solver", info)
        passes, gap = torch.maximum(before.passes, info.passes), torch.maximum(before.gap, info.gap)
        total[address]["solver"] = Info(passes, gap, before.fell_back | info.fell_back)


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


def _infos(stats: Stats) -> dict[str, Info]:
    return {address: report["solver"] for address, report in stats.items() if "solver" in report}
