"""What goes row by row or number by number: norms, rotary turns, SwiGLU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from plait.ops.rms_norm import gated_rms_norm, rms_norm
from plait.ops.rotary import rotate
from plait.ops.swiglu import swiglu
from step_kernels.measuring import BF16, DEVICE, FP32, LIMITS, Case, Run, Sets, apart, require


@dataclass(frozen=True)
class Rows:
    """Rows of `groups` times d channels, with or without a gate."""

    b: int
    groups: int
    d: int
    gated: bool
    dtype: torch.dtype = BF16

    def __str__(self) -> str:
        gate = ", gated" if self.gated else ""
        return f"b {self.b} of {self.groups} x {self.d}{gate}, {str(self.dtype).removeprefix('torch.')}"


def norm_inputs(rows: Rows, seed: int = 0) -> tuple[Any, ...]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    both = torch.randn(2, rows.b, 1, rows.groups, rows.d, device=DEVICE, generator=generator).to(rows.dtype)
    weight = torch.randn(rows.d, device=DEVICE, generator=generator)
    return both[0], weight, 1e-6, *([both[1]] if rows.gated else [])


def norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    return rms_norm(x, weight, eps) if gate is None else gated_rms_norm(x, gate, weight, eps)


def by_torch(*inputs: Any) -> Tensor:
    with torch.enable_grad():  # what training runs
        return norm(*inputs)


def check_norms() -> float:
    worst = 0.0
    for shape in ((3, 5, 77), (1, 16, 128), (2, 1, 1024), (5, 1, 8192)):
        for gated in (False, True):
            for dtype in (BF16, FP32):
                inputs = norm_inputs(Rows(*shape, gated, dtype))
                want = norm(*(x.double() if isinstance(x, Tensor) else x for x in inputs))
                worst = max(worst, apart(norm(*inputs), want) / LIMITS[dtype])
    require(worst <= 1, f"norms are {worst:.1f} times further from float64 than they may")
    return worst


def norms(form: Callable[..., Tensor], rows: Rows) -> Sets:
    return lambda n: [partial(form, *norm_inputs(rows, seed)) for seed in range(n)]


def norm_cases() -> Iterator[Case]:
    for sizes in ((1, 1024, False), (16, 128, True), (1, 2048, True)):
        for rows in (Rows(b, *sizes) for b in (1, 32)):
            moved = (2 + rows.gated) * rows.b * rows.groups * rows.d * 2
            yield Case("norm", str(rows), moved, norms(norm, rows), {}, {"torch": norms(by_torch, rows)})


# --- number by number


def heads(b: int, seed: int = 0, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    """Queries and keys of 20 heads of 64, cut out of a projection, with angles."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(b, 1, 24, 64, device=DEVICE, generator=generator)[:, :, :20]
    angles = torch.randn(b, 1, 1, 1, 32, device=DEVICE, generator=generator)
    return x.to(dtype), angles.cos().to(dtype), torch.cat([-angles.sin(), angles.sin()], -2).to(dtype)


def hidden(b: int, seed: int = 0, dtype: torch.dtype = BF16) -> tuple[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(b, 1, 2 * 2816, device=DEVICE, generator=generator).to(dtype),)


SMALL = {"rotate": (rotate, heads), "swiglu": (swiglu, hidden)}


def check_small() -> float:
    worst = 0.0
    for op, make in SMALL.values():
        for b in (1, 5):
            for dtype in (BF16, FP32):
                inputs = make(b, 0, dtype)
                worst = max(worst, apart(op(*inputs), op(*(x.double() for x in inputs))) / LIMITS[dtype])
    require(worst <= 1, f"{worst:.1f} times further from float64 than allowed")
    return worst


def small_cases() -> Iterator[Case]:
    for name, (op, make) in SMALL.items():
        for b in (1, 32):

            def sets(n: int, form: Callable[..., Tensor] = op, b: int = b, make: Any = make) -> list[Run]:
                return [partial(form, *make(b, seed)) for seed in range(n)]

            def plain(n: int, op: Callable[..., Tensor] = op, sets: Any = sets) -> list[Run]:
                return sets(n, torch.enable_grad()(op))

            yield Case(name, f"b {b}", 2 * make(b)[0].nbytes, sets, {}, {"torch": plain})
