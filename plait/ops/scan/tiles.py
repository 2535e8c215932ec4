"""The elementwise recurrence on a GPU: the kernels of `plait.ops.scan.triton`, in float32."""

from functools import partial

import torch

from plait.ops.kernels import Call, needs_tokens
from plait.ops.scan import chunked


def fits(call: Call) -> str | None:
    """None, or why the kernels do not fit."""
    if reason := needs_tokens(call):
        return reason
    return "computes in float32, the inputs are float64" if call.dtype == torch.float64 else None


run = partial(chunked.run, tiles=True)
