"""Numbers that a device is still at: asked for when they are made, read when they are there."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Late:
    """A tensor, or dicts and NamedTuples of tensors, on their way to the host.

    What is read is of the moment this was made, and waits for that alone: not for what was queued on the device since.
    """

    def __init__(self, numbers: Any):
        self._numbers = numbers
        flat = [tensor.detach().reshape(-1) for tensor in leaves(numbers)]
        wide = torch.float32 if flat and flat[0].device.type == "mps" else torch.float64  # whole numbers stay exact
        self._host, self._there = torch.cat([x.to(wide) for x in flat] or [torch.empty(0, device="cpu")]), None
        if self._host.is_cuda:
            there = torch.empty(self._host.shape, dtype=wide, device="cpu", pin_memory=True)
            self._host = there.copy_(self._host, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> Any:
        """The same with Python's numbers in the tensors' places, in lists where a tensor has dimensions."""
        if self._there is not None:
            self._there.synchronize()
        shapes = [tensor.shape for tensor in leaves(self._numbers)]
        parts = self._host.cpu().split([shape.numel() for shape in shapes])
        return rebuilt(self._numbers, (part.view(shape).tolist() for part, shape in zip(parts, shapes, strict=True)))


def leaves(numbers: Any) -> Iterator[Tensor]:
    """The tensors, in order."""
    if isinstance(numbers, Tensor):
        yield numbers
        return
    for part in numbers.values() if isinstance(numbers, dict) else numbers:
        yield from leaves(part)


def rebuilt(numbers: Any, values: Iterator[Any]) -> Any:
    """`numbers` with the next of `values` in each tensor's place."""
    if isinstance(numbers, Tensor):
        return next(values)
    if isinstance(numbers, dict):
        return {key: rebuilt(part, values) for key, part in numbers.items()}
    return type(numbers)(*(rebuilt(part, values) for part in numbers))
