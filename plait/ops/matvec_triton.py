"""A matrix times one vector, as a Triton kernel that reads the matrix once."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import triton
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch

COLUMNS, NUMBERS = 2048, 8192  # of the matrix that a program has at a time: so wide at most, and in all
PROGRAMS = 2048  # so many at least, where there are rows enough: 16 for each multiprocessor


@kernel
def product(
    x, weight, bias, y, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """A program does BN rows of the matrix."""
    row, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    there = weight + row[:, None].to(tl.int64) * K + k[None, :]
    total = tl.zeros([BN, BK], tl.float32)
    for start in tl.static_range(0, K, BK):
        inside = (row < N)[:, None] & (start + k < K)[None, :]
        numbers = tl.load(there + start, mask=inside, other=0.0)
        factor = tl.load(x + start + k, mask=start + k < K, other=0.0)
        total += numbers.to(tl.float32) * factor.to(tl.float32)[None, :]
    out = tl.sum(total, 1)
    if bias is not None:
        out += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(y + row, out.to(y.dtype.element_ty), mask=row < N)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """x of k numbers, weight (n, k), bias (n) or None, y of n numbers, all in one piece."""
    N, K = weight.shape
    BK = min(COLUMNS, triton.next_power_of_2(K))
    BN = max(1, min(NUMBERS // BK, triton.next_power_of_2(N // PROGRAMS + 1) // 2))
    launch(product, -(-N // BN), x, weight, bias, y, N=N, K=K, BN=BN, BK=BK, num_warps=4 if BN * BK > 1024 else 2)
