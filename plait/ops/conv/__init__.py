"""Causal depthwise convolution over time: y_t = sum_i w_i x_{t-i}, one short filter per channel."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from plait.ops.conv import chunked, reference, step
from plait.ops.frame import Rows, recur
from plait.ops.kernels import Kernel, always, cast, many_tokens, one_token
from plait.ops.packing import Packing


def _after(state: Tensor, x: Tensor) -> Tensor:
    """What stands before the tokens, and they."""
    return torch.cat([cast(state, x.dtype), x], 1)


def _form(run: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A form that takes a state, of one that looks back within `x` only."""

    def form(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        state: Tensor | None,
        packing: Packing | None,
        own: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if state is None:
            return run(x, weight, bias, None, packing), None
        tail = state.shape[1]
        if packing is None:
            past = _after(state, x)
            return run(past, weight, bias, tail, None), cast(past.narrow(1, x.shape[1], tail), state.dtype)
        past = _after(state, packing.to_rows(x))  # (n, tail + t, d)
        y = run(past, weight, bias, tail, None)
        return packing.from_rows(y), packing.last(past, tail).to(state.dtype)

    return form


KERNELS = (
    Kernel("step", _form(step.run), one_token),
    Kernel("chunked", _form(chunked.run), many_tokens),
    Kernel("reference", _form(reference.run), always),
)


def causal_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    state: Float[Tensor, "n tail d"] | None = None,
    rows: Rows | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "n tail d"] | None]:
    """Outputs and, where a state was given, each sequence's last w - 1 inputs. `weight[:, -1]` is the token's own tap.

    Before the start of a sequence stands its state, else zeros. n is the batch, or the number of packed documents. With
    `rows`, `state` is a pool's (`plait.ops.frame`).
    """
    y, state = recur(KERNELS, x, (x, weight, bias), state=state, rows=rows, packing=packing)
    return y, state
