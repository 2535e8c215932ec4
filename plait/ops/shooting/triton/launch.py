"""Kernel launches with less work for the host, which counts where a call takes a fraction of a millisecond."""

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}


def launch(kernel: Any, programs: int, *args: Tensor | float | None, **constants: Any) -> None:
    """`kernel[(programs,)](*args, **constants)`, constants being constexprs and options.

    Triton works out at every launch which of a kernel's compiled forms fits. Here a form that was launched once is kept
    under all that it was chosen by, and launched as it is, as in Triton's tutorial on fused softmax.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter compiles nothing
        kernel[(programs,)](*args, **constants)
        return
    key = (id(kernel), torch.cuda.current_device(), *map(_kind, args), *constants.items())
    form = _compiled.get(key)
    if form is None:
        names = tuple(kernel.arg_names[len(args) :])
        _compiled[key] = kernel[(programs,)](*args, **constants), names
        return
    compiled, names = form
    compiled[programs, 1, 1](*args, *[constants[name] for name in names])


def _kind(arg: Tensor | float | None) -> Any:
    """All of an argument that Triton may compile in."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return type(arg), arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31, arg < 2**63
    return type(arg)
