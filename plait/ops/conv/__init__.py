"""Causal depthwise convolution over time: y_t = sum_i w_i x_{t-i}, one short filter per channel."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from plait.ops.conv import chunked, pooled, reference, step, tokens
from plait.ops.frame import Rows, newest, recur
from plait.ops.kernels import Kernel, Kernels, always, cast, one_token
from plait.ops.packing import Packing
from plait.ops.summary import Tail


def _form(run: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]]:
    """A form that takes a state, of one that looks back within `x` only."""

    def form(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        state: Tensor | None,
        packing: Packing | None,
        own: bool = False,
        at: Tensor | None = None,
        **around: Any,
    ) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:
        if state is None:
            return run(x, weight, bias, None, packing, **around), None
        tail = state.shape[1]
        past = torch.cat([cast(state, x.dtype), x if packing is None else packing.to_rows(x)], 1)  # (n, tail + t, d)
        y = run(past, weight, bias, tail, None, **around)
        if packing is None:
            last = cast(newest(past, tail), state.dtype)
            if at is None:
                return y, last
            seen = at[:, None] + torch.arange(1, tail + 1, device=x.device)  # (m, tail)
            return y, last, cast(past[:, seen], state.dtype)
        return packing.from_rows(y), packing.last(past, tail).to(state.dtype)

    return form


class Activation(NamedTuple):
    """SiLU of what comes out."""

    silu: bool = True

    def before(self, *inputs: Any) -> tuple[Any, ...]:
        return inputs

    def after(self, y: Tensor, *inputs: Any) -> Tensor:
        return F.silu(y)


SILU = Activation()


KERNELS = Kernels(
    "conv",
    (
        Kernel("triton", pooled.run, pooled.supports, rows=True),
        Kernel("step", step.run, one_token),
        Kernel("tokens", _form(tokens.run), tokens.fits, around=True),
        Kernel("chunked", _form(chunked.run), always),
        Kernel("reference", _form(reference.run), always),
    ),
)


def causal_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    silu: bool = False,
    state: Float[Tensor, "n tail d"] | None = None,
    rows: Rows | None = None,
    packing: Packing | None = None,
    at: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "n tail d"] | None, *tuple[Float[Tensor, "b m tail d"], ...]]:
    """Outputs and, where a state was given, each sequence's last w - 1 inputs. `weight[:, -1]` is the token's own tap.

    Before the start of a sequence stands its state, else zeros. n is the batch, or the number of packed documents. silu: of
    the outputs. With `rows`, `state` is a pool's (`plait.ops.frame`). With `at`, numbers of tokens, the states after these
    come third.
    """
    sizes = pooled.sizes_of(state, weight) if rows is not None else weight.shape[1] if x.is_cuda else None
    around = SILU if silu else None
    return recur(KERNELS, x, (x, weight, bias), state, rows, packing, at=at, sizes=sizes, around=around)


def summary(x: Float[Tensor, "b t d"], width: int) -> Tail:
    """What `causal_conv` with a filter of `width` does to any state before these tokens."""
    kept = min(width - 1, x.shape[1])
    return Tail(x.narrow(1, x.shape[1] - kept, kept), width - 1)
