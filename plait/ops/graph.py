"""Hand-written gradients inside compiled graphs."""

from collections.abc import Callable
from typing import Any

import torch

# whether this torch's Dynamo may look into an autograd.Function
LOOKS_INSIDE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def whole(function: type[torch.autograd.Function]) -> Callable[..., Any]:
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
