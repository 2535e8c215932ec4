"""The elementwise recurrence on a GPU: the kernels of `plait.ops.scan.triton`, in float32."""

from functools import partial

import torch

from plait.ops.kernels import Call
from plait.ops.scan import chunked
from plait.ops.token import ARCHITECTURE


def fits(call: Call) -> str | None:
    """None, or why the kernels do not fit."""
    if call.device != "cuda":
        return "needs an NVIDIA GPU"
    if call.architecture is not None and call.architecture < ARCHITECTURE:
        return "needs compute capability {}.{}, this is {}.{}".format(*ARCHITECTURE, *call.architecture)
    if call.tokens == "one":
        return "only for several tokens"
    return "computes in float32, the inputs are float64" if call.dtype == torch.float64 else None


run = partial(chunked.run, tiles=True)
