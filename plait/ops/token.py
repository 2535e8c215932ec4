"""What kernels for a decoding step ask about a call."""

from typing import NamedTuple

import torch
from torch import Tensor

from plait.ops.kernels import Call, needs_nvidia

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256  # keys of a head


FEW = 4096  # rows that a step may have; from there on torch's kernels fill the chip


def few_rows(*tensors: Tensor, widest: int = 8192) -> bool:
    """Whether a call on the rows (*n, d) of these is that of a decoding step, and no compiler would do better by fusing it with
    what is around."""
    x = tensors[0]
    return (
        x.is_cuda
        and 0 < x.numel() <= FEW * x.shape[-1]
        and x.shape[-1] <= widest
        and x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(y.stride(-1) == 1 for y in tensors)
    )


class Held(NamedTuple):
    """A pool's tensor: its dtype, whether a row lies in one piece, and how many numbers lie side by side in it."""

    dtype: torch.dtype
    whole: bool
    width: int


def held(state: Tensor | None) -> Held | None:
    if state is None:
        return None
    return Held(state.dtype, state[:1].is_contiguous(), state.shape[-1])


def on_gpu(call: Call) -> str | None:
    """None, or why no kernel fits."""
    if reason := needs_nvidia(call):
        return reason
    if call.tokens != "one":
        return "only for a single token"
    if not call.pooled:
        return "only for rows of a pool"
    if call.dtype not in DTYPES:
        return f"no kernel for {call.dtype}"
    return None


def linear(call: Call) -> str | None:
    """Of a recurrence whose state is a matrix."""
    reason, state = on_gpu(call), call.sizes
    if reason is not None or state is None:
        return reason
    if state.dtype != torch.float32:
        return f"states are {state.dtype}"
    if state.width > WIDEST:
        return f"keys of {state.width} are above {WIDEST}"
    return None if state.whole else "a row of the pool does not lie in one piece"
