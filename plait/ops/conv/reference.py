"""The convolution written out, token by token: the definition."""

import torch
from torch import Tensor

from plait.ops.packing import Packing


def run(x: Tensor, weight: Tensor, bias: Tensor | None, skip: int | None, packing: Packing | None) -> Tensor:
    """x (b, t, d); with `skip`, the first `skip` tokens are only there to be looked back at and give no output."""
    if packing is not None:
        return torch.cat([run(x[:, start:end], weight, bias, None, None) for start, end in packing.bounds], 1)
    taps = weight.T.to(x.dtype)  # (w, d), the token's own tap last
    outputs = []
    for t in range(skip or 0, x.shape[1]):
        seen = x[:, max(0, t - len(taps) + 1) : t + 1]  # (b, up to w, d)
        y = (seen * taps[len(taps) - seen.shape[1] :]).sum(1)
        outputs.append(y if bias is None else y + bias)
    return torch.stack(outputs, 1)
