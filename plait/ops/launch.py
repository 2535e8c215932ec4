"""Kernel launches with less work for the host, which counts where a call takes a fraction of a millisecond."""

from functools import lru_cache
from inspect import signature
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

# what follows a call's length or batch; compiled in, every new length would be compiled for, which takes seconds
LENGTHS = ("stride_b", "stride_h", "dx_b", "dx_h", "tokens", "number", "n", "capacity", "splits", "inner")

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}


def kernel(run: Any) -> Any:
    """`triton.jit` for a kernel that is launched: one compiled form for all lengths."""
    jit: Any = triton.jit  # whose overloads know no `do_not_specialize` with a function
    return jit(run, do_not_specialize=[name for name in LENGTHS if name in signature(run).parameters])


def launch(kernel: Any, programs: int, *args: Tensor | float | None, **constants: Any) -> None:
    """`kernel[(programs,)](*args, **constants)`, constants being constexprs and options.

    Triton works out at every launch which of a kernel's compiled forms fits. Here a form that was launched once is kept
    under all that it was chosen by, and launched as it is, as in Triton's tutorial on fused softmax.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter compiles nothing
        kernel[(programs,)](*args, **constants)
        return
    kinds = (_kind(arg, free) for arg, free in zip(args, _free(kernel), strict=False))
    key = (id(kernel), torch.cuda.current_device(), *kinds, *constants.items())
    form = _compiled.get(key)
    if form is None:
        names = tuple(kernel.arg_names[len(args) :])
        _compiled[key] = kernel[(programs,)](*args, **constants), names
        return
    compiled, names = form
    compiled[programs, 1, 1](*args, *[constants[name] for name in names])


@lru_cache
def _free(kernel: Any) -> tuple[bool, ...]:
    """Which parameters are declared `do_not_specialize`."""
    return tuple(parameter.do_not_specialize for parameter in kernel.params)


def _kind(arg: Tensor | float | None, free: bool = False) -> Any:
    """All of an argument that Triton may compile in; of a `free` number that is no more than its width."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int) and free:
        return type(arg), -(2**31) <= arg < 2**31, arg < 2**63
    if isinstance(arg, int):
        return type(arg), arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31, arg < 2**63
    return type(arg)
