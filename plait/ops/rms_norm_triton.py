"""RMSNorm of a few rows as one Triton kernel each: with a gate, or of a sum; in float32 from one end to the other."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import triton
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch


@kernel
def normalise(
    x, weight, gate, y, eps, inner, x_n, x_i, gate_n, gate_i,
    D: tl.constexpr, BD: tl.constexpr, ONE_WEIGHT: tl.constexpr, ZERO_CENTERED: tl.constexpr, GATE_FIRST: tl.constexpr,
):  # fmt: skip
    """A program does one row, `inner` of which share an outer index."""
    row = tl.program_id(0)
    n, i = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
    d = tl.arange(0, BD)
    values = tl.load(x + n * x_n + i * x_i + d, mask=d < D, other=0.0).to(tl.float32)
    factor = tl.load(weight + (0 if ONE_WEIGHT else i * D) + d, mask=d < D, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        factor += 1.0
    if gate is not None:
        g = tl.load(gate + n * gate_n + i * gate_i + d, mask=d < D, other=0.0).to(tl.float32)
        g *= tl.sigmoid(g)
        if GATE_FIRST:
            values *= g
        else:
            factor *= g
    scale = tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    tl.store(y + row.to(tl.int64) * D + d, (values * scale * factor).to(y.dtype.element_ty), mask=d < D)


def run(
    x: Tensor, weight: Tensor, gate: Tensor | None, out: Tensor, eps: float, zero_centered: bool, gate_first: bool
) -> None:
    """x, gate and out (n, i, d), weight (d) or (i d): one for all i, or for each its own."""
    n, inner, D = x.shape
    BD = triton.next_power_of_2(D)
    strides = (0, 0) if gate is None else gate.stride()[:2]
    launch(
        normalise, n * inner, x, weight, gate, out, eps, inner, *x.stride()[:2], *strides,
        D=D, BD=BD, ONE_WEIGHT=weight.numel() == D, ZERO_CENTERED=zero_centered, GATE_FIRST=gate_first,
        num_warps=max(1, min(8, BD // 256)),
    )  # fmt: skip


@kernel
def normalise_sum(
    x, y, weight, total, normed, eps, x_n, y_n, D: tl.constexpr, BD: tl.constexpr, ZERO_CENTERED: tl.constexpr
):
    """A program does one row; what is normed is the sum as it is stored."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    values = tl.load(x + row * x_n + d, mask=d < D, other=0.0).to(tl.float32)
    values += tl.load(y + row * y_n + d, mask=d < D, other=0.0).to(tl.float32)
    rounded = values.to(total.dtype.element_ty)
    tl.store(total + row * D + d, rounded, mask=d < D)
    values = rounded.to(tl.float32)
    factor = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        factor += 1.0
    scale = tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    tl.store(normed + row * D + d, (values * scale * factor).to(normed.dtype.element_ty), mask=d < D)


def run_sum(
    x: Tensor, y: Tensor, weight: Tensor, total: Tensor, normed: Tensor, eps: float, zero_centered: bool
) -> None:
    """All (n, d), weight (d)."""
    n, D = x.shape
    BD = triton.next_power_of_2(D)
    launch(
        normalise_sum, n, x, y, weight, total, normed, eps, x.stride(0), y.stride(0),
        D=D, BD=BD, ZERO_CENTERED=zero_centered, num_warps=max(1, min(8, BD // 256)),
    )  # fmt: skip
