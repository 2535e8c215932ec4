"""A diagonal cell at a single token on the rows of a pool, in place: the kernel as torch sees it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plait.ops.frame import Rows
from plait.ops.kernels import Call
from plait.ops.operator import operator
from plait.ops.shooting.cells import KNOWN, Bound
from plait.ops.token import on_gpu


@operator("shooting_step", mutates=("state",))
def _step(x: Tensor, state: Tensor, rows: Tensor | None, tensors: Sequence[Tensor], cell: str) -> tuple[Tensor, Tensor]:
    """h (b, 1, h, k) in x's dtype, and (passes, gap, fell back)."""
    from plait.ops.shooting.triton import step

    h, info = x.new_empty(*x.shape[:2], *x.shape[3:]), x.new_empty(3, dtype=torch.float32)
    step.run(Bound(KNOWN[cell], tensors[0], None, tuple(tensors[1:])), x, state, rows, h, info)
    return h, info


@torch.library.register_fake("plait::shooting_step")
def _(x, state, rows, tensors, cell):
    return x.new_empty(*x.shape[:2], *x.shape[3:]), x.new_empty(3, dtype=torch.float32)


def run(cell: Bound, x: Tensor, options: Any, *, state: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `shooting` with t = 1."""
    place, index = (state[rows], None) if isinstance(rows, slice) else (state, rows)
    h, info = _step(x, place, index, cell.tensors(), cell.cell.key)
    return h, state, info


def supports(call: Call) -> str | None:
    reason = on_gpu(call)
    if reason is not None or call.sizes is None:
        return reason
    from plait.ops.shooting import triton

    return triton.supports(call)
