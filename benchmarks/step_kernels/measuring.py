"""What is measured of a kernel, how, and how far from float64 it may be."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SETS_BYTES, MOST_SETS = 200e6, 24  # four times the cache of an H100; the layers of a model
# rounding of what comes out, and in attention of the weights, to 8 or 11 bits; float32 sums over some thousands of terms
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}
DEVICE, BF16, FP16, FP32 = "cuda", torch.bfloat16, torch.float16, torch.float32

Run = Callable[[], Any]
Sets = Callable[[int], list[Run]]  # so many calls, each on tensors of its own


@dataclass
class Case:
    """One kernel at one shape, other plans for it, and other ways to the same."""

    kernel: str
    shape: str
    bytes: int
    sets: Sets
    variants: dict[str, dict[str, int]] = field(default_factory=dict)
    rivals: dict[str, Sets] = field(default_factory=dict)


def captured(runs: list[Run]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def microseconds(runs: list[Run], repeat: int = 40) -> float:
    """Of one call, in the middle of `repeat` replays."""
    graph = captured(runs)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    del graph
    return 1e3 * statistics.median(times) / len(runs)


def copy_speed() -> float:
    """Bytes read and written per second by a large copy."""
    a = torch.randn(2**28, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.nbytes / (1e-6 * microseconds([lambda: b.copy_(a)]))


def apart(got: Tensor, want: Tensor) -> float:
    """Not a number is infinitely far."""
    distance = float((got.double() - want.double()).norm() / want.double().norm())
    return distance if distance == distance else float("inf")


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote is not a number."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def require(true: bool, what: str) -> None:
    if not true:
        raise SystemExit(f"WRONG: {what}")
