"""Which of torch's fused kernels attention may run in.

On an H100 torch prefers cuDNN's, which makes a plan for every shape it meets: tens of milliseconds, many times what the call
itself takes. That pays where the same shape comes again, as in training on whole rows, and never where keys grow by a token
a call, where prompts have any length, or where documents have theirs. There torch chooses among the others.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from plait.ops.graph import gradient, one_step
from plait.ops.kernels import FEW, Call

T = TypeVar("T")

DEVICES = ("cuda",)  # where cuDNN is
LINE = 16  # bytes
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def may_plan(q: Tensor) -> bool:
    """Whether calls of this shape are likely to come again and again, or nothing here makes plans."""
    if q.device.type not in DEVICES:
        return True
    return q.shape[1] > FEW and q.requires_grad and torch.is_grad_enabled()


def for_any_length(run: Callable[..., T], *args: Any) -> T:
    """`run(*args)` by kernels that need no plan."""
    if torch.compiler.is_compiling():  # Dynamo knows this switch and puts it into the graph
        with sdpa_kernel(ANY_LENGTH):
            return run(*args)
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return run(*args)
    torch.backends.cuda.enable_cudnn_sdp(False)  # a twentieth of the time that `sdpa_kernel` takes, many times a token
    try:
        return run(*args)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


class _Lined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o: Tensor) -> Tensor:
        return o.view_as(o)

    @staticmethod
    @gradient
    def backward(ctx, do: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return lined(do)


_lined = one_step(_Lined)


def with_lined_gradient(o: Tensor) -> Tensor:
    """o, whose gradient reaches torch's kernels as they need it on a GPU."""
    return _lined(o) if o.requires_grad and o.device.type in DEVICES else o


def lined(x: Tensor) -> Tensor:
    """x where it, or a copy of it, begins each row at a multiple of 16 bytes. The memory-efficient kernel reads so many at a
    time, wherever a gradient that is a part of a larger one begins, and CUDA stops the process ("misaligned address")."""
    if torch.compiler.is_compiling():  # a graph says nothing of where things lie
        return x.clone(memory_format=torch.contiguous_format)
    places = (x.storage_offset(), *(stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1))
    if x.stride(-1) == 1 and all(place * x.itemsize % LINE == 0 for place in places):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def of_one_size(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with zeros behind keys or values, whichever are smaller, where torch's fused kernel takes one size alone: on a
    CPU, where without it every weight would be kept."""
    missing = k.shape[3] - v.shape[3]
    if missing == 0 or q.device.type != "cpu":
        return q, k, v
    if missing > 0:
        return q, k, F.pad(v, (0, missing))
    return F.pad(q, (0, -missing)), F.pad(k, (0, -missing)), v


def chosen(call: Call) -> str | None:
    """The kernel that torch picks for full attention of so many queries without gradients, where it can be asked."""
    count = {"one": 1, "few": FEW, "many": 512}[call.tokens]
    try:
        q = torch.empty(1, 4, count, 64, dtype=call.dtype, device=call.device)
        number = for_any_length(torch._fused_sdp_choice, q, q, q)
    except (RuntimeError, NotImplementedError, AssertionError):  # no such device here, or one that does not say
        return None
    names = {int(backend.value): name for name, backend in SDPBackend.__members__.items()}  # type: ignore[attr-defined]
    return f"torch's {names[number].lower().replace('_', ' ')} kernel"
