"""Kernels as torch operators, so that a compiled graph holds each call as one step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHEAP: set[str] = set()  # operators whose results are sooner computed again than kept


def operator(
    name: str, mutates: tuple[str, ...] = (), cheap: bool = False, strided: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.custom_op` as plait::name, whose first call would load torch's compiler, and Triton with it.

    What it `mutates` are arguments' names; cheap: one of `CHEAP`; strided: it takes rows at any distance, so that the compiler
    need not copy those that it has set apart for alignment. Its first tensor's device is where it launches.
    """

    if cheap:
        CHEAP.add(name)

    def define(run: Callable[..., Any]) -> Any:
        tags = (torch.Tag.needs_fixed_stride_order,) if strided else ()
        torch.library.define(f"plait::{name}", torch.library.infer_schema(run, mutates_args=mutates), tags=tags)

        def on_its_device(*args: Any) -> Any:  # where Triton launches is the current device, whatever the tensors say
            with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
                return run(*args)

        torch.library.impl(f"plait::{name}", "CompositeExplicitAutograd")(on_its_device)
        return getattr(torch.ops.plait, name)

    return define


def evenly(x: Tensor) -> Tensor:
    """x (b, t, *n), rows (b, t) at one distance from each other and the last axis in one piece; itself where that is so."""
    apart = x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)
    return x.contiguous() if apart or x.stride(-1) != 1 else x
