"""What would fit where something does not: sizes that were tried."""

import gc
from collections.abc import Callable
from typing import Any

import torch


def no_memory(error: BaseException) -> bool:
    """Whether it says that memory could not be had, on a GPU or by torch's allocator on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def tried(run: Callable[[], Any]) -> bool:
    """Whether `run` finds the memory that it asks for. Its other errors are raised."""
    fits = True
    try:
        run()
    except (RuntimeError, MemoryError) as error:
        if not no_memory(error):
            raise
        fits = False
    release()  # not before the error is gone, whose traceback holds what had been allocated
    return fits


def largest(run: Callable[[int], Any], below: int) -> int | None:
    """The first of below / 2, below / 4, ... 1 with which `run` finds its memory; None where it does with none."""
    while below > 1:
        below //= 2
        size = below
        if tried(lambda size=size: run(size)):
            return size
    return None


def release() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
