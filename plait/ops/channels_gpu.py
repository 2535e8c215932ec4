"""Chunked recurrences with a decay per key channel on a GPU: for which calls, and a layer's gates before them."""

from typing import Protocol

import torch
from torch import Tensor

from plait.ops import chunks_gpu
from plait.ops.kernels import Call
from plait.ops.packing import Packing

REMOVAL = "removal"  # as `Call.sizes`: along a vector that is no key
WIDEST_FLOAT32 = 128  # of heads in float32: of larger ones a processor has no room for a chunk


class Gates(Protocol):
    """A layer's way to the inputs of `run`."""

    def before(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]: ...


def fits(call: Call) -> str | None:
    """None, or why the kernels do not fit."""
    if call.device == "cuda" and call.sizes == REMOVAL:
        return "removes along keys alone"
    if call.dtype != torch.float32:
        return chunks_gpu.fits(call)
    if isinstance(call.sizes, chunks_gpu.Sizes) and max(call.sizes) > WIDEST_FLOAT32:
        return f"heads of {max(call.sizes)} in float32 are above {WIDEST_FLOAT32}"
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
