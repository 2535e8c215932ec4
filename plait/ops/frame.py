"""What every recurrence does around the form that runs: no autocast, the rows of a pool that a call is about, the dtypes."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from plait.ops.kernels import Kernels, cast, choose, full_precision
from plait.ops.packing import Packing

Rows = Int[Tensor, " b"] | slice


def recur(
    kernels: Kernels,
    like: Tensor,
    arguments: tuple[Any, ...],
    *,
    state: Tensor | None,
    rows: Rows | None,
    packing: Packing | None,
    sizes: Any = None,
) -> tuple[Any, ...]:
    """Outputs in the dtype of `like` (b, t, ...), the state, and what else the form gives.

    A form is called as `run(*arguments, state, packing, own)` and gives (y, new state or None, ...). Without `rows`, `state`
    (n, ...) is a value, which no form writes to. With them it is a pool's tensor: row i of the call goes on from
    `state[rows[i]]`, its new state is written there, and `state` itself comes back. `own` tells a form that `state` is
    contiguous and its to overwrite; a form that does so returns it. Rows must be distinct.
    """
    with full_precision(like.device):
        run = choose(kernels, like, packed=packing is not None, pooled=rows is not None, sizes=sizes).run
        if rows is None:
            y, state, *more = run(*arguments, state=state, packing=packing, own=False)
        else:
            place, held = _taken(state, rows, len(like), packing)
            y, new, *more = run(*arguments, state=held, packing=None, own=True)
            state = _put_back(state, rows, place, new)
    return cast(y, like.dtype), state, *more


def _taken(state: Tensor | None, rows: Rows, batch: int, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """The rows' place, which for a slice is in the pool itself, and their states, contiguous: the place where that can be."""
    if state is None or packing is not None:
        wrong = "no state" if state is None else "packed documents"
        raise ValueError(f"rows are those of a pool's state, one for each row of the call; got {wrong}")
    if torch.is_grad_enabled():
        raise ValueError("a pool is written in place and keeps no gradients; call under torch.no_grad()")
    place = state[rows] if isinstance(rows, slice) else state.index_select(0, rows)
    if len(place) != batch:
        raise ValueError(f"rows must name one row of the pool for each of the call's {batch}, got {len(place)}")
    return place, place if place.is_contiguous() else place.contiguous()


def _put_back(state: Any, rows: Rows, place: Tensor, new: Tensor) -> Tensor:
    if not isinstance(rows, slice):
        state.index_copy_(0, rows, cast(new, state.dtype))
    elif new is not place:
        place.copy_(new)
    return state
