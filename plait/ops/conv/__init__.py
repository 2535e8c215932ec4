"""Causal depthwise convolution over time: y_t = sum_i w_i x_{t-i}, one short filter per channel."""

import torch
from jaxtyping import Float
from torch import Tensor

from plait.ops.conv import chunked, reference, step
from plait.ops.graph import by_documents
from plait.ops.kernels import Kernel, always, cast, choose, many_tokens, one_token
from plait.ops.packing import Packing

KERNELS = (
    Kernel("step", step.run, one_token),
    Kernel("chunked", chunked.run, many_tokens),
    Kernel("reference", reference.run, always),
)


@by_documents
def causal_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    state: Float[Tensor, "n tail d"] | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "n tail d"] | None]:
    """Outputs and, where a state was given, each sequence's last w - 1 inputs. `weight[:, -1]` is the token's own tap.

    Before the start of a sequence stands its state, else zeros. n is the batch, or the number of packed documents.
    """
    run = choose(KERNELS, x).run
    if state is None:
        return run(x, weight, bias, None, packing), None
    rows = x if packing is None else packing.to_rows(x)  # (n, t, d)
    past = torch.cat([cast(state, x.dtype), rows], 1)
    y = run(past, weight, bias, state.shape[1], None)
    if packing is None:
        return y, cast(past.narrow(1, x.shape[1], state.shape[1]), state.dtype)
    return packing.from_rows(y), packing.last(past, state.shape[1]).to(state.dtype)
