"""The convolution as w shifted multiply-adds over whole rows: each is one pass over memory that the compiler can fuse."""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.packing import Packing


def run(x: Tensor, weight: Tensor, bias: Tensor | None, skip: int | None, packing: Packing | None) -> Tensor:
    """Shapes as in `reference.run`."""
    width, t = weight.shape[1], x.shape[1]
    y = x * weight[:, -1]
    for back in range(1, min(width, t)):
        earlier = F.pad(x[:, : t - back], (0, 0, back, 0))
        if packing is not None:
            earlier = earlier * (packing.offsets >= back)[..., None]
        y = torch.addcmul(y, earlier, weight[:, -1 - back])
    y = y if bias is None else y + bias
    return y[:, skip:] if skip else y
