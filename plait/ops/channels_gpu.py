"""Chunked recurrences with a decay per key channel on a GPU: for which calls, and a layer's gates before them."""

from typing import Protocol

import torch
from torch import Tensor

from plait.ops import chunks_gpu
from plait.ops.kernels import Call
from plait.ops.packing import Packing

REMOVAL = "removal"  # as `Call.sizes`: along a vector that is no key
FLOAT32 = 64, 128  # heads in float32: narrower ones have not been held on a GPU, for wider ones a processor has no room


class Gates(Protocol):
    """A layer's way to the inputs of `run`."""

    def before(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]: ...


def fits(call: Call) -> str | None:
    """None, or why the kernels do not fit."""
    if call.device == "cuda" and call.sizes == REMOVAL:
        return "removes along keys alone"
    if call.dtype != torch.float32:
        return chunks_gpu.fits(call)
    if isinstance(call.sizes, chunks_gpu.Sizes):
        for size in call.sizes:
            if not FLOAT32[0] <= size <= FLOAT32[1]:
                return f"heads of {size} in float32 are not between {FLOAT32[0]} and {FLOAT32[1]}"
    return chunks_gpu.fits(call._replace(dtype=torch.bfloat16))


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    scale: float = 1.0,
    gates: Gates | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `gla` and, with `beta`, in `gated_delta`, whose `gates` it takes too."""
    if gates is not None and beta is not None:
        q, k, v, g, beta = gates.before(q, k, v, g, beta)
    return chunks_gpu.run(q, k, v, g, beta, state=state, packing=packing, scale=scale)
