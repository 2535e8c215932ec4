"""Nonlinear recurrences h_t = f(h_{t-1}, x_t) in parallel over time, by multiple shooting (docs/shooting.md)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.design.spelling import suggest
from plait.ops.frame import Rows, recur
from plait.ops.kernels import Call, Kernel, Kernels, always, cast, needs_nvidia, one_token, wide
from plait.ops.numbers import whole_number
from plait.ops.packing import Packing
from plait.ops.shooting import library, pooled, reference
from plait.ops.shooting.cells import EMPTY as EMPTY
from plait.ops.shooting.cells import GRU as GRU
from plait.ops.shooting.cells import LSTM as LSTM
from plait.ops.shooting.cells import RNN as RNN
from plait.ops.shooting.cells import SLSTM as SLSTM
from plait.ops.shooting.cells import Bound as Bound
from plait.ops.shooting.cells import Cell as Cell

SOLVERS = ("shooting", "sequential")

# How far a joint may gape, in units of the state or of 1: a few roundings of what is computed in, or half a rounding of what
# comes out; twice that where 16-bit products by a matrix round h itself, so that no joint closes further.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def tolerance(cell: Bound, dtype: torch.dtype) -> float:
    """What `shooting` closes the joints to unless told otherwise."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return TOLERANCES[dtype] * (2 if narrow and not cell.diagonal else 1)


class Info(NamedTuple):
    """How a call was solved, as tensors on its device. `gap`: the largest miss at a joint when the solver stopped;
    `fell_back`: the passes did not close it, so the tokens ran one by one and the answer is exact all the same."""

    passes: Tensor
    gap: Tensor
    fell_back: Tensor


class NotConverged(RuntimeError):
    """Raised in strict mode only."""


class Sizes(NamedTuple):
    """What forms ask about a recurrence: its cell, whether it is a number per unit, has a bias, how many further weights a
    unit has, the solver, and what keeps kernels from reading the inputs where they lie."""

    cell: type[Cell]
    diagonal: bool
    bias: bool
    weights: int
    solver: str = "shooting"
    memory: str | None = None


def sizes_of(cell: Bound, x: Tensor, solver: str) -> Sizes:
    memory = None
    if not x.numel():
        memory = "no tokens"
    elif x.stride(-1) != 1 and x.shape[-1] > 1:
        memory = "the last dimension of x is not contiguous"
    return Sizes(type(cell.cell), cell.diagonal, cell.bias is not None, len(cell.weights), solver, memory)


class Options(NamedTuple):
    solver: str
    tol: float
    max_passes: int | None


def shooting(
    cell: Bound,
    x: Float[Tensor, "b t g h k"],
    *,
    state: Float[Tensor, "n s h k"] | None = None,
    rows: Rows | None = None,
    packing: Packing | None = None,
    at: Int[Tensor, " m"] | None = None,
    tol: float | None = None,
    max_passes: int | None = None,
    strict: bool = False,
    solver: str = "shooting",
) -> tuple[Float[Tensor, "b t h k"], Float[Tensor, "n s h k"] | None, Info, *tuple[Float[Tensor, "b m s h k"], ...]]:
    """Outputs in x's dtype, where a state was given the states after the last token, and how it was solved.

    x: the projected inputs, g per unit, h heads of k units. state: the states before the first token (the cell's own start if
    left out), one row per batch row, or per packed document; with `rows`, a pool's (`plait.ops.frame`). Computed in float32,
    float64 for float64. The result is within about `tol` (`tolerance`) of the loop over tokens; where `max_passes` do not get
    there, the loop itself is run. at: numbers of tokens, the states after which come fourth.
    strict: raise NotConverged instead (waits for the device).
    solver: "shooting", or "sequential": the loop over tokens, in torch's operations.
    """
    _check(cell, x, solver)
    if max_passes is not None:
        max_passes = whole_number("max_passes", max_passes, 1)
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be above 0, got {tol}")
    if state is not None:
        _check_state(cell, x, state, rows, packing)
    options = Options(solver, tolerance(cell, x.dtype) if tol is None else tol, max_passes)
    sizes = sizes_of(cell, x, solver)
    h, state, info, *states = recur(KERNELS, x, (cell, x, options), state, rows, packing, at=at, sizes=sizes)
    if strict and bool(info[2] > 0):
        raise NotConverged(
            f"{type(cell.cell).__name__}: a gap of {float(info[1]):.1e} is left after {int(info[0])} passes, "
            f"above tol {options.tol:.0e}; the cell is not contracting here (allow fall-back with strict=False, or bound its "
            "recurrent weights with `clip`)"
        )
    return h, state, Info(info[0].int(), info[1], info[2] > 0), *states


def _check(cell: Bound, x: Tensor, solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; {suggest(solver, SOLVERS)}")
    g, heads, k = cell.recurrent.shape[:3]
    if x.ndim != 5 or x.shape[2:] != (g, heads, k):
        raise ValueError(
            f"{type(cell.cell).__name__}: x must be (batch, time, {g}, {heads}, {k}), a number per unit for each of "
            f"{', '.join(cell.cell.inputs)}; got {tuple(x.shape)}"
        )


def _check_state(cell: Bound, x: Tensor, state: Tensor, rows: Rows | None, packing: Packing | None) -> None:
    count = len(state) if rows is not None else x.shape[0] if packing is None else packing.count
    if state.shape != (count, len(cell.cell.states), *x.shape[3:]):
        raise ValueError(
            f"{type(cell.cell).__name__}: state must be {(count, len(cell.cell.states), *x.shape[3:])}, a number per unit for "
            f"each of {', '.join(cell.cell.states)}; got {tuple(state.shape)}"
        )


def _exact(like: Tensor) -> Tensor:
    return torch.eye(1, 3, dtype=torch.float32, device=like.device)[
        0
    ]  # a list would be copied, which no graph may capture


def _form(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """A form that takes a state, of one that starts from the states `h0` of every sequence, or without them."""

    def form(
        cell: Bound,
        x: Tensor,
        options: Options,
        *,
        state: Tensor | None,
        packing: Packing | None,
        own: bool = False,
        at: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        h0 = None if state is None else cast(state, dtype)
        h, final, *more = run(cell, x, h0, packing, options) if at is None else run(cell, x, h0, packing, options, at)
        return h, None if state is None else final, *more

    return form


def _step(cell: Bound, x: Tensor, h0: Tensor | None, packing: Packing | None, options: Options) -> tuple[Tensor, ...]:
    h0 = library.start(cell, x, packing) if h0 is None else h0
    s = cell.to(h0.dtype).step(wide(x[:, 0]), h0)
    return s[:, 0][:, None], s, _exact(x)


def _reference(
    cell: Bound,
    x: Tensor,
    h0: Tensor | None,
    packing: Packing | None,
    options: Options,
    at: Tensor | None = None,
) -> tuple[Tensor, ...]:
    h0 = library.start(cell, x, packing) if h0 is None else h0
    states, final = reference.run(cell.to(h0.dtype), wide(x), h0, packing)
    return states[:, :, 0], final, _exact(x), *(() if at is None else (states[:, at],))


def _solver(kernel: str):
    def run(
        cell: Bound,
        x: Tensor,
        h0: Tensor | None,
        packing: Packing | None,
        options: Options,
        at: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        cu_seqlens = None if packing is None else packing.cu_seqlens
        how, tensors = (cell.cell.key, cell.bias is not None, kernel, *options), cell.tensors()
        if torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in (x, h0, *tensors)):
            return library.Solve.apply(how, cu_seqlens, x, h0, *tensors)
        # where Dynamo would miscount a Function's *args
        h, _, final, info, states = library.solve(x, h0, tensors, cu_seqlens, *how, at)
        return h, final, info, *(() if at is None else (states,))

    return run


def _on_gpu(call: Call) -> str | None:
    if reason := needs_nvidia(call):
        return reason
    if call.tokens == "one":
        return "one token fills no chunk"
    return None if call.sizes is None or call.sizes.solver == "shooting" else f"the solver is {call.sizes.solver}"


def _diagonal(call: Call) -> str | None:
    reason = _on_gpu(call)
    if reason is not None or call.sizes is None:
        return reason
    if call.at and call.dtype != torch.float32:
        return "its outputs are rounded, and the states after chosen tokens would be"
    from plait.ops.shooting import triton

    return triton.supports(call)


def _matrices(call: Call) -> str | None:
    reason = _on_gpu(call)
    if reason is not None:
        return reason
    if call.sizes is None or call.sizes.diagonal:
        return "for recurrences with a matrix per head"
    from plait.ops.shooting.triton import matrices

    return matrices.supports(call)


KERNELS = Kernels(
    "shooting",
    (
        Kernel("triton step", pooled.run, pooled.supports, rows=True),
        Kernel("step", _form(_step), one_token),
        Kernel("triton", _form(_solver("triton")), _diagonal),
        Kernel("matrices", _form(_solver("matrices")), _matrices),
        Kernel("chunked", _form(_solver("chunked")), always),
        Kernel("reference", _form(_reference), always),
    ),
)
