"""What stands between an expert's two matrices: silu(gate) up, or relu(up)^2 of one without a gate."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plait.ops.swiglu import swiglu


def activated(hidden: Float[Tensor, "*n w"], gated: bool) -> Float[Tensor, "*n h"]:
    return swiglu(hidden) if gated else torch.relu(hidden).square()


def pulled(hidden: Float[Tensor, "n w"], gated: bool) -> tuple[Float[Tensor, "n h"], Callable[[Tensor], Tensor]]:
    """The same, and what takes a gradient at it to one at `hidden`, once."""
    if not gated:
        rectified = torch.relu(hidden)
        return rectified.square(), lambda da: rectified.mul_(da).mul_(2)
    gate, value = hidden.chunk(2, -1)
    silu = F.silu(gate)

    def back(da: Tensor) -> Tensor:
        return torch.cat([torch.ops.aten.silu_backward(value.mul(da), gate), silu.mul_(da)], -1)

    return silu * value, back
