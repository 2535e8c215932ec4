"""Diagonal recurrences as Triton kernels, for NVIDIA GPUs from compute capability 8.0."""

from functools import lru_cache

import torch
from torch import Tensor

from plait.ops.kernels import Call
from plait.ops.packing import Packing
from plait.ops.shooting.cells import Bound
from plait.ops.shooting.triton import states
from plait.ops.shooting.triton.cells import DEVICE
from plait.ops.shooting.triton.gradients import Gradients
from plait.ops.shooting.triton.plan import Plan, forced_plan, layout, plan, spans
from plait.ops.shooting.triton.states import Work

__all__ = ["Plan", "backward", "forced_plan", "forward", "plan", "supports"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def passes(tol: float) -> int:
    """How many to launch unless told otherwise. Every pass of a grid is launched, needed or not, since nobody asks the
    device. After the burn-in contracting cells take one, such that remember for hundreds of steps two in bfloat16, four in
    float32."""
    return 3 if tol > 1e-5 else 5


def supports(call: Call) -> str | None:
    """None, or why these kernels do not fit the call."""
    sizes = call.sizes
    if sizes.cell not in DEVICE:
        return f"no kernel for {sizes.cell.__name__}"
    if not sizes.diagonal:
        return "the recurrence is a matrix"
    if sizes.bias:
        return "the recurrence has a bias"
    if call.dtype not in DTYPES:
        return f"no kernel for {call.dtype}"
    return sizes.memory


def forward(
    cell: Bound, x: Tensor, h0: Tensor, packing: Packing | None, tol: float, max_passes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (b, t, g, h, k), h0 (n, s, h, k) -> h (b, t, h, k), the other states (b, t, s-1, h, k), final (n, s, h, k), and
    (passes, gap, fell back or not), float32."""
    work = _work(cell, x, packing)
    b, t, _, heads, k = x.shape
    start, final = h0.float().contiguous(), torch.empty_like(h0, dtype=torch.float32).contiguous()
    h = x.new_empty(b, t, heads, k)
    rest = x.new_empty(b, t, work.states - 1, heads, k, dtype=torch.float32)
    run = getattr(states, work.plan.kind)
    info = run(work, h, rest, start, final, tol, max_passes)
    return h, rest, final, info


def backward(
    cell: Bound,
    x: Tensor,
    h0: Tensor,
    h: Tensor,
    rest: Tensor,
    dh: Tensor | None,
    dfinal: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients at x, at h0 and at `cell.tensors()`, from those at h and at the final states."""
    work = _work(cell, x, packing)
    dh = None if dh is None else dh.contiguous()
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    gradients = Gradients(work, h0.float().contiguous(), h, rest, dh, dfinal)
    dh0, dw = getattr(gradients, work.plan.kind)()
    sizes = [x.shape[2]] + [1] * len(cell.weights)  # apart, since an operator's outputs may not share memory
    parts = [part.sum(0).view(w.shape) for part, w in zip(dw.split(sizes, 1), cell.tensors(), strict=True)]
    return gradients.dx, dh0.view(h0.shape), parts


def _work(cell: Bound, x: Tensor, packing: Packing | None) -> Work:
    rows = spans(x, packing)
    longest = max(length for _, _, length in rows)
    tokens = sum(length for _, _, length in rows)
    units = x.shape[3] * x.shape[4]
    chosen = plan(-(-tokens // longest), units, longest, _multiprocessors(x.device))
    return Work(cell, x, rows, chosen, layout(x, chosen.BD))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
