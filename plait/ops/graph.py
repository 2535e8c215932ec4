"""Hand-written gradients inside compiled graphs, and autograd inside of operators."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from plait.ops.kernels import full_precision

F = TypeVar("F", bound=Callable[..., Any])

# whether this torch's Dynamo may look into an autograd.Function
LOOKS_INSIDE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def one_step(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, which torch.compile takes into its graph as one step.

    Before torch 2.13 Dynamo would look inside, and loses the gradient of a Function that works in place (its input's
    gradient comes out as zero, without an error; found by the law "compiled"). From 2.13 on it gets this right.
    """
    if LOOKS_INSIDE:
        return function.apply

    def apply(*args: Any) -> Any:
        return function.apply(*args)

    torch.compiler.allow_in_graph(apply)  # marks the function, and gives it back
    return apply


def gradient(backward: F) -> F:
    """A hand-written `backward` of a Function. Autocast has no say in it, whether gradients are taken inside of one or a
    compiler traces them there: its products would come out in bfloat16, beside float32 and for float32 inputs."""

    @wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        device = next((g.device for g in gradients if g is not None), None)
        if device is None:
            return backward(ctx, *gradients)
        if torch.compiler.is_compiling():  # while Dynamo is in here the forward's switch may hold, later on it does not
            with torch.autocast(device.type, enabled=False):
                return backward(ctx, *gradients)
        with full_precision(device):
            return backward(ctx, *gradients)

    return once_differentiable(run)  # type: ignore[return-value]


def _same(x: Tensor) -> Tensor:
    return x


_AUTOGRAD_KEYS = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther)


@contextmanager
def autograd_inside() -> Iterator[None]:
    """Autograd within the body of a custom op, where torch switches it off, dispatch keys and all. What it saves is its own:
    hooks around the op, such as activation checkpointing's, would run the whole slot again to give it back."""
    before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in _AUTOGRAD_KEYS]
    for key in _AUTOGRAD_KEYS:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(_same, _same):
            yield
    finally:
        for key, excluded in zip(_AUTOGRAD_KEYS, before, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)
