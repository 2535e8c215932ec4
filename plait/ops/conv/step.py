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
    taps = cast(weight, x.dtype).T  # (w, d), the token's own last
    if past.shape[1] < len(taps):
        taps = taps[-past.shape[1] :]
    y = (past * taps).sum(1, keepdim=True)  # (b, 1, d)
    if bias is not None:
        y = y + cast(bias, x.dtype)
    return y, None if state is None else cast(past.narrow(1, 1, state.shape[1]), state.dtype)
