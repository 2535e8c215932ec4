"""Which form of an op runs, and why the others do not.

The choice depends on the tensors' device, dtype and shapes alone, never on what can be imported.
`PLAIT_KERNELS=reference` (or `chunked`) forces one form everywhere; `forced("reference")` does so for a block of code.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.design.spelling import suggest

_forced: str | None = os.environ.get("PLAIT_KERNELS")


class Call(NamedTuple):
    """What a choice may depend on."""

    tokens: int
    device: str
    dtype: torch.dtype
    subject: Any = None  # what else an op's forms ask about, such as the cell of a recurrence; None: the usual one


@dataclass(frozen=True, slots=True)
class Kernel:
    """One form of an op. `supports` gives None, or the reason why this form does not fit the call; `within` says which of a
    library's kernels the form comes down to, where that is not plait's own choice."""

    name: str
    run: Callable[..., Any]
    supports: Callable[[Call], str | None]
    within: Callable[[Call], str | None] = lambda call: None


def always(call: Call) -> str | None:
    return None


def one_token(call: Call) -> str | None:
    return None if call.tokens == 1 else "only for a single token"


def many_tokens(call: Call) -> str | None:
    return None if call.tokens > 1 else "one token fills no chunk"


def choose(kernels: Sequence[Kernel], x: Tensor, subject: Any = None) -> Kernel:
    """The first kernel, in order of preference, that fits `x` (b, t, ...) and what the op says beside it."""
    if _forced is not None:
        for kernel in kernels:
            if kernel.name == _forced:
                return kernel
        raise ValueError(f"PLAIT_KERNELS={_forced}: no such kernel; {suggest(_forced, [k.name for k in kernels])}")
    call = Call(x.shape[1], x.device.type, x.dtype, subject)
    for kernel in kernels:
        if kernel.supports(call) is None:
            return kernel
    raise AssertionError("the reference fits every call")


def explain(kernels: Sequence[Kernel], call: Call) -> list[tuple[str, str]]:
    """Each kernel's name, for the one that is used with the library's kernel it comes down to, and "used", or the reason
    why not; what `plait doctor` prints."""
    rows, found = [], False
    for kernel in kernels:
        name, reason = kernel.name, kernel.supports(call)
        if reason is None:
            reason = "used" if not found else "fits, but a faster form comes first"
            if not found and (within := kernel.within(call)):
                name += f" ({within})"
            found = True
        rows.append((name, reason))
    return rows


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Force one form of every op inside the block."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """No autocast inside the block. Entering torch's own switch costs as much as several small ops."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)  # type: ignore[return-value]  # a context manager without a value


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without its cost where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def wide(x: Tensor) -> Tensor:
    """At least float32: what recurrences and norms compute in."""
    return x if x.dtype == torch.float64 else x.float()
