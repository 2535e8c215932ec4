"""Kernels as torch operators, so that a compiled graph holds each call as one step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHEAP: set[str] = set()  # operators whose results are sooner computed again than kept


def operator(name: str, mutates: tuple[str, ...] = (), cheap: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.custom_op` as plait::name, whose first call would load torch's compiler, and Triton with it.

    What it `mutates` are arguments' names; cheap: one of `CHEAP`. Its first tensor's device is where it launches.
    """

    if cheap:
        CHEAP.add(name)

    def define(run: Callable[..., Any]) -> Any:
        torch.library.define(f"plait::{name}", torch.library.infer_schema(run, mutates_args=mutates))

        def on_its_device(*args: Any) -> Any:  # where Triton launches is the current device, whatever the tensors say
            with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
                return run(*args)

        torch.library.impl(f"plait::{name}", "CompositeExplicitAutograd")(on_its_device)
        return getattr(torch.ops.plait, name)

    return define
