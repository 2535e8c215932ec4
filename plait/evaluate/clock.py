"""Seconds on a device: of single calls, and between calls that are given to it without waiting."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


def now(device: torch.device) -> float:
    """Seconds on the host's clock, when all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(run: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """What each of `rounds` calls takes, from the moment when everything before it is done."""
    times = []
    for _ in range(rounds):
        started = now(device)
        run()
        times.append(now(device) - started)
    return times


def intervals(step: Callable[[], Any], device: torch.device, rounds: int, *, waiting: bool) -> list[float]:
    """Seconds from the end of a step to the end of the next. waiting: until the step before is done, as decoding reads its
    tokens when the next has been launched; else nothing waits between them, as in training."""
    marks = Marks(device)
    marks.mark()
    for _ in range(rounds):
        step()
        marks.mark()
        if waiting:
            marks.catch_up()
    return marks.between()


class Marks:
    """Moments of a device's work. A GPU is not waited for: it notes the time when it gets there, as training lets it run on."""

    def __init__(self, device: torch.device):
        self._device, self._marks = device, list[Any]()

    def mark(self) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def catch_up(self) -> None:
        """Wait until the device has come to the mark before the last."""
        if self._device.type == "cuda" and len(self._marks) > 1:
            self._marks[-2].synchronize()

    def between(self) -> list[float]:
        """Seconds from each mark to the next."""
        if self._device.type != "cuda":
            return [after - before for before, after in pairwise(self._marks)]
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._marks)]
