"""Attention of new tokens to those before them too, as torch's flash kernel on a GPU: a prompt read in chunks needs no masks.

The kernel lines queries and keys up at their ends, so that the last query sees all keys; torch's own function knows no such
mask but one that is written out, t numbers a key.
"""

from typing import Any

import torch
from torch import Tensor

from plait.ops.kernels import FEW

aten: Any = torch.ops.aten  # a kernel that torch calls by name alone

DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 256  # numbers of a head


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes this call; gradients go other ways."""
    size = q.shape[3]
    return (
        q.is_cuda
        and q.shape[1] > FEW
        and q.dtype in DTYPES
        and k.dtype == v.dtype == q.dtype
        and size == v.shape[3] <= WIDEST
        and size % 8 == 0
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
        and not torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
    )


def run(q: Tensor, k: Tensor, v: Tensor, gap: int, window: int | None, scale: float) -> Tensor:
    """Query i stands where key i + gap does, 0 <= gap; shapes as in `attention`."""
    end = gap + q.shape[1]
    k, v = k[:, :end], v[:, :end]
    causal, before = window is None, -1 if window is None else window - 1
    o, *_ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], end, 0.0, causal, False, scale=scale,
        window_size_left=before, window_size_right=-1 if causal else 0,
    )  # fmt: skip
    return o
