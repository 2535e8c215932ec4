"""Devices by name, and what fits on them."""

import os

import torch

from plait.design.count import parameters
from plait.design.model import ModelConfig
from plait.design.spec import BYTES
from plait.design.spelling import suggest
from plait.design.summary import si, size


def find_device(device: str | torch.device) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):  # torch's words list all that it has ever run on
        raise ValueError(
            f"device {str(device)!r}: there is no such device; expected auto, cpu, cuda or cuda:INDEX"
        ) from None
    if kind == "meta":
        raise ValueError("device 'meta' holds no numbers; expected auto, cpu, cuda or cuda:INDEX")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # what comes after is advice on building torch
        raise ValueError(f"device {str(device)!r}: {reason}; expected auto, cpu, cuda or cuda:INDEX") from None


def find_dtype(name: str | None) -> torch.dtype | None:
    """A floating point dtype by its name; None: none is asked for. Raises ValueError naming the nearest."""
    if name is None:
        return None
    if name not in BYTES:
        raise ValueError(f"dtype {name!r}; {suggest(name, BYTES)}")
    return getattr(torch, name)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for what is no dtype of weights."""
    if dtype not in [getattr(torch, name) for name in BYTES]:
        raise ValueError(f"dtype must be one of {', '.join(f'torch.{name}' for name in BYTES)}; got {dtype!r}")


def check_room(design: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError where a model's weights alone are more than all memory that the device has."""
    name, have = str(dtype).removeprefix("torch."), memory(device)
    count = parameters(design)
    if have is not None and count * BYTES[name] > have:
        raise ValueError(
            f"a design of {si(count)} parameters needs {size(count * BYTES[name])} in {name}, and {device} has "
            f"{size(have)}: fewer than {si(have / BYTES[name])} would fit; choose a smaller dim, vocab or pattern"
        )


def memory(device: torch.device) -> int | None:
    """All bytes that a device has; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
