"""Which form of an op runs, and why the others do not.

The choice depends on what a `Call` says alone, never on what can be imported. It is made once for each kind of call; a
compiled graph holds no choice. `PLAIT_KERNELS=reference` forces one form of every op, `ssd=reference,delta=chunked` of some;
`forced(...)` does so for a block of code. A form that does not fit a call is refused.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from plait.design.spelling import suggest

Tokens = Literal["one", "few", "many"]

FEW = 16  # tokens a row up to which a call is a draft, or decoding


OPS = {
    "attention": "plait.ops.attention:KERNELS",
    "packed_attention": "plait.ops.attention:PACKED",
    "paged_attention": "plait.ops.attention.paged:KERNELS",
    "write_pages": "plait.ops.attention.paged:WRITERS",
    "conv": "plait.ops.conv:KERNELS",
    "ssd": "plait.ops.ssd:KERNELS",
    "delta": "plait.ops.delta:KERNELS",
    "gla": "plait.ops.gla:KERNELS",
    "shooting": "plait.ops.shooting:KERNELS",
    "mlstm": "plait.ops.mlstm:KERNELS",
    "moe": "plait.ops.moe:KERNELS",
    "scan": "plait.ops.scan:KERNELS",
    "selective": "plait.ops.selective:KERNELS",
}


class Call(NamedTuple):
    """What a choice may depend on: plain values, and no lengths, so that there are few kinds of call."""

    device: str
    dtype: torch.dtype
    tokens: Tokens
    gradients: bool = False  # whether they may be asked for
    packed: bool = False
    pooled: bool = False  # the state is rows of a pool
    at: bool = False  # states after chosen tokens are asked for
    sizes: Any = None  # what else an op's forms ask about, such as the cell of a recurrence; None: the usual one
    architecture: tuple[int, int] | None = None  # CUDA's compute capability


AMPERE = (8, 0)  # the first of NVIDIA's that computes in bfloat16


def needs_nvidia(call: Call, oldest: tuple[int, int] = AMPERE) -> str | None:
    """None, or what is missing: a GPU of NVIDIA's with this compute capability."""
    if call.device != "cuda":
        return "needs an NVIDIA GPU"
    if call.architecture is not None and call.architecture < oldest:
        return "needs compute capability {}.{}, this is {}.{}".format(*oldest, *call.architecture)
    return None


def needs_tokens(call: Call) -> str | None:
    """The same, of a kernel for several tokens."""
    return needs_nvidia(call) or ("only for several tokens" if call.tokens == "one" else None)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One form of an op. `supports` gives None, or the reason why this form does not fit the call; `within` says which of a
    library's kernels the form comes down to, where that is not plait's own choice.

    wide: the form wants a recurrence's inputs in float32 at least and its q scaled, rather than as they are and `scale`.
    rows: it reads and writes a pool's rows itself. around: it does what a layer does around
    the op, as forms with rows do.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[[Call], str | None]
    within: Callable[[Call], str | None] = lambda call: None
    wide: bool = False
    rows: bool = False
    around: bool = False


@dataclass(frozen=True, eq=False)
class Kernels:
    """The forms of an op, the preferred one first; the last fits every call. A form after the first that fits every call runs
    only where it is forced."""

    op: str
    forms: Sequence[Kernel]
    known: dict[Any, Kernel] = field(default_factory=dict)  # what was chosen for each kind of call


def kernels_of(op: str) -> Kernels:
    """By name, one of `OPS`."""
    return resolve_name(OPS[op])


def always(call: Call) -> str | None:
    return None


def one_token(call: Call) -> str | None:
    return None if call.tokens == "one" else "only for a single token"


def choose(
    kernels: Kernels,
    x: Tensor,
    *,
    packed: bool = False,
    pooled: bool = False,
    at: bool = False,
    gradients: bool | None = None,
    sizes: Any = None,
) -> Kernel:
    """The first form that fits `x` (b, t, ...) and what the op says beside it. gradients: as autograd's switch says."""
    count = x.shape[1]
    kind: Tokens = "one" if count == 1 else "few" if count <= FEW else "many"
    if gradients is None:
        gradients = torch.is_grad_enabled()
    facts = x.device, x.dtype, kind, gradients, packed, pooled, at, sizes
    form = forced_form(kernels.op) if _forced else None
    if torch.compiler.is_compiling():
        return _find(kernels, _call(*facts), form)
    kernel = kernels.known.get((facts, form))
    if kernel is None:
        kernel = kernels.known[facts, form] = _find(kernels, _call(*facts), form)
    return kernel


def _call(device: torch.device, *facts: Any) -> Call:
    architecture = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return Call._make((device.type, *facts, architecture))


def _find(kernels: Kernels, call: Call, form: str | None) -> Kernel:
    for kernel in kernels.forms:
        if form is None and kernel.supports(call) is None:
            return kernel
        if kernel.name == form:
            reason = kernel.supports(call)
            if reason is not None:
                raise ValueError(f"PLAIT_KERNELS: {kernels.op}={form} does not fit this call: {reason}")
            return kernel
    names = [kernel.name for kernel in kernels.forms]
    raise ValueError(f"PLAIT_KERNELS: {kernels.op} has no form {form!r}; {suggest(str(form), names)}")


def explain(kernels: Kernels, call: Call) -> list[tuple[str, str]]:
    """Each form's name, for the one that is used with the library's kernel it comes down to, and "used", or the reason
    why not; what `plait doctor` prints."""
    rows, found, form = [], False, forced_form(kernels.op)
    for kernel in kernels.forms:
        name, reason = kernel.name, kernel.supports(call)
        if form is not None:
            fits = "used, forced" if name == form else f"fits, but {form!r} is forced"
        else:
            fits = "fits, but another form comes first" if found else "used"
        reason = reason or fits
        if reason.startswith("used"):
            found = True
            if within := kernel.within(call):
                name += f" ({within})"
        rows.append((name, reason))
    return rows


def _parsed(text: str | None) -> dict[str, str]:
    """The forced form of each op; under "" that of all others."""
    forms = {}
    for part in filter(None, map(str.strip, (text or "").split(","))):
        op, _, form = (word.strip() for word in part.rpartition("="))
        if op and op not in OPS:
            raise ValueError(f"PLAIT_KERNELS: there is no op {op!r}; {suggest(op, OPS)}")
        forms[op] = form
    return forms


_forced = _parsed(os.environ.get("PLAIT_KERNELS"))


def forced_form(op: str) -> str | None:
    return _forced.get(op) or _forced.get("")


@contextmanager
def forced(forms: str | None) -> Iterator[None]:
    """Force forms inside the block, written as in PLAIT_KERNELS; None: leave the choice free."""
    global _forced
    before, _forced = _forced, _parsed(forms)
    try:
        yield
    finally:
        _forced = before


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """No autocast inside the block. Entering torch's own switch costs as much as several small ops."""
    if not torch.is_autocast_enabled(device.type):
        return _UNCHANGED
    return torch.autocast(device.type, enabled=False)  # type: ignore[return-value]  # a context manager without a value


_UNCHANGED = nullcontext()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without its cost where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


WIDE = (torch.float32, torch.float64)


def wide(x: Tensor) -> Tensor:
    """At least float32: what recurrences and norms compute in."""
    return x if x.dtype in WIDE else x.float()
