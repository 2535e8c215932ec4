"""Where a device's time goes, kernel by kernel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True)
class Kernel:
    """Kernels of one name in a call: milliseconds in all, how many there are, and their share of the time of all kernels. On a
    CPU, torch's operators, without those that they call."""

    name: str
    ms: float
    calls: float
    share: float


def kernels(run: Callable[[], Any], device: torch.device, rounds: int = 2) -> list[Kernel]:
    """All kernels of `run`, means over `rounds` calls, the longest first. Raises what `run` does."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as seen:
        for _ in range(rounds):
            run()
        if cuda:
            torch.cuda.synchronize(device)
    found: dict[str, tuple[float, int]] = {}
    for row in seen.key_averages():
        time = row.self_device_time_total if cuda else row.self_cpu_time_total
        if time > 0 and not row.is_user_annotation:
            found[row.key] = (time, row.count)
    total = sum(time for time, _ in found.values())
    rows = [Kernel(name, time / 1e3 / rounds, count / rounds, time / total) for name, (time, count) in found.items()]
    return sorted(rows, key=lambda row: -row.ms)
