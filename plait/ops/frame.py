"""What every recurrence does around the form that runs: no autocast, the rows of a pool that a call is about, the dtypes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from plait.ops.kernels import WIDE, Kernel, Kernels, cast, choose, full_precision, wide
from plait.ops.packing import Packing

Rows = Int[Tensor, " b"] | slice


class Around(Protocol):
    """What a layer does to an op's inputs before, and to its outputs after: a NamedTuple of its weights. A form that takes rows
    has its own way to the same, and gets the weights by name."""

    def before(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]: ...

    def after(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def _asdict(self) -> dict[str, Any]: ...


def recur(
    kernels: Kernels,
    like: Tensor,
    inputs: tuple[Any, ...],
    state: Tensor | None,
    rows: Rows | None,
    packing: Packing | None,
    *,
    scale: float | None = None,
    at: Int[Tensor, " m"] | None = None,
    sizes: Any = None,
    around: Around | None = None,
) -> tuple[Any, ...]:
    """Outputs in the dtype of `like` (b, t, ...), the state, and what else the form gives; `around` them what a layer does.
    With `at`, the numbers of some of the t tokens, the last are the states (b, m, ...) after them, without gradients.

    A form is called as `run(*inputs, state, packing, own)` and gives (y, new state or None, ...); one that takes no wide inputs
    gets `scale` too where there is one. Without `rows`, `state` (n, ...) is a value, which no form writes to. With them it is a
    pool's tensor: row i of the call goes on from `state[rows[i]]`, its new state is written there, and `state` itself comes
    back. `own` tells a form that `state` is contiguous and its to overwrite; a form that does so returns it. Rows must be
    distinct. `at` is given to forms that run several tokens.
    """
    several = False
    if at is not None:
        _check_at(at, state, packing)
        several = like.shape[1] > 1
    kernel = choose(kernels, like, packed=packing is not None, pooled=rows is not None, at=several, sizes=sizes)
    run, given = kernel.run, inputs
    if several:
        run = partial(run, at=at)
    if around is not None and (kernel.rows or kernel.around):
        run, around = partial(run, **around._asdict()), None
    if around is not None:
        inputs = around.before(*inputs)
    y, state, *more = _computed(kernel, run, like, inputs, state, rows, packing, scale)
    if at is not None and not several:
        more.append(_copies(state, rows, len(at)))
    return y if around is None else around.after(y, *given), state, *more


def _computed(
    kernel: Kernel,
    run: Callable[..., tuple[Any, ...]],
    like: Tensor,
    inputs: tuple[Any, ...],
    state: Tensor | None,
    rows: Rows | None,
    packing: Packing | None,
    scale: float | None,
) -> tuple[Any, ...]:
    if torch.is_autocast_enabled(like.device.type):  # asked here, since a `with` costs as much as some steps do
        with full_precision(like.device):
            return _computed(kernel, run, like, inputs, state, rows, packing, scale)
    if kernel.wide:
        inputs = tuple([x if x.dtype in WIDE else wide(x) for x in inputs])
        if scale is not None:
            inputs = (inputs[0] * scale, *inputs[1:])
    elif scale is not None:
        run = partial(run, scale=scale)
    if rows is None:
        y, state, *more = run(*inputs, state=state, packing=packing, own=False)
    else:
        if state is None or packing is not None or torch.is_grad_enabled():
            _refuse(state, packing)
        if kernel.rows:
            y, state, *more = run(*inputs, state=state, rows=rows)
        else:
            y, state, *more = _on_rows(run, inputs, state, rows, len(like))
    return y if y.dtype == like.dtype else y.to(like.dtype), state, *more


def newest(x: Tensor, count: int) -> Tensor:
    """The last `count` along time (b, t, ...), which a state keeps: in memory of their own where they are few of many, as a
    view would keep all of a prompt's chunk for as long as the state lives."""
    last = x.narrow(1, x.shape[1] - count, count)
    return last if torch.compiler.is_compiling() or x.shape[1] <= 2 * count else last.clone()


def _check_at(at: Tensor, state: Tensor | None, packing: Packing | None) -> None:
    if at.ndim != 1:
        raise ValueError(f"at must be the numbers of some tokens, the same for all rows; got {tuple(at.shape)}")
    if state is None or packing is not None:
        wrong = "no state" if state is None else "packed documents"
        raise ValueError(f"states after chosen tokens are of rows that start from a state; got {wrong}")
    if torch.is_grad_enabled():
        raise ValueError("states after chosen tokens have no gradients; call under torch.no_grad()")


def _copies(state: Any, rows: Rows | None, count: int) -> Tensor:
    """The states after a single token, once for each time that it was asked for."""
    last = state if rows is None else state[rows].clone()
    return last[:, None].expand(-1, count, *[-1] * (last.ndim - 1))


def _refuse(state: Tensor | None, packing: Packing | None) -> NoReturn:
    if state is None or packing is not None:
        wrong = "no state" if state is None else "packed documents"
        raise ValueError(f"rows are those of a pool's state, one for each row of the call; got {wrong}")
    raise ValueError("a pool is written in place and keeps no gradients; call under torch.no_grad()")


def _on_rows(
    run: Callable[..., tuple[Any, ...]], inputs: tuple[Any, ...], state: Any, rows: Rows, batch: int
) -> tuple[Any, ...]:
    """A form that knows no pools, on the states that `rows` names: in the pool itself where they are a slice of it."""
    place = state[rows] if isinstance(rows, slice) else state.index_select(0, rows)
    if len(place) != batch:
        raise ValueError(f"rows must name one row of the pool for each of the call's {batch}, got {len(place)}")
    held = place if place.is_contiguous() else place.contiguous()
    y, new, *more = run(*inputs, state=held, packing=None, own=True)
    if not isinstance(rows, slice):
        state.index_copy_(0, rows, cast(new, state.dtype))
    elif new is not place:
        place.copy_(new)
    return y, state, *more
