"""The convolution at a single token: one weighted sum over what it sees."""

import torch
from torch import Tensor

from plait.ops.kernels import cast
from plait.ops.packing import Packing


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, state: Tensor | None, packing: Packing | None, own: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `causal_conv` with t = 1, so packed or not there is one sequence per row."""
    past = x if state is None else torch.cat([state if state.dtype == x.dtype else state.to(x.dtype), x], 1)
    taps, seen = cast(weight, x.dtype).t(), past.shape[1]  # (w, d), the token's own last
    if seen < weight.shape[1]:
        taps = taps[-seen:]
    y = (past * taps).sum(1, keepdim=True)  # (b, 1, d)
    if bias is not None:
        y = y + cast(bias, x.dtype)
    return y, None if state is None else cast(past.narrow(1, 1, seen - 1), state.dtype)
