"""What a law compares, and how closely two ways of computing the same thing must agree."""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from plait.design.ends import Vectors
from plait.design.model import ModelConfig
from plait.model import LanguageModel, build
from plait.state import Appended, Branches, ModelState, SlotState

Values = dict[str, Tensor]

# Largest difference over largest value, the same on every device: (outputs and states, gradients).
# float64 is what finds mistakes. Measured over all designs: 3e-12, and 2e-10 with extreme gates, whose summed logs
#   reach 1e5 and so lose as many digits. The rest is room for machines that sum in another order.
# float32 shows that the dtype people run has no fault of its own, such as decays summed in too few digits. Measured:
#   outputs 2e-5, gradients 5e-4, the decays' under extreme gates the worst; the reference itself is up to 2e-4 from
#   float64. The mildest real mistake known, a convolution not reset between packed documents, shows as 3e-4 in outputs.
# Under autocast two ways of computing differ by the roundings of bfloat16, 2^-9 each, in every product. Measured: outputs
# 1e-2, gradients 9e-2 (inductor, which rounds less often); a wrong gradient is off by its own size.
AUTOCAST = (2**-4, 2**-2)

# bfloat16 is checked for what only it has, such as a dtype that does not fit. Weights are rounded too, and what layers round
# adds up: measured on an H100 over designs of at most four layers, 2e-1 at most. Deeper ones reach 2e-1 in outputs too.
TOLERANCES = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-4, 1e-3), torch.bfloat16: (2**-3, 2**-1)}

# A gradient much smaller than its neighbours is a difference of large numbers, so it is judged against this part of the
# largest one.
SMALL = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 2**-4}


class LawBroken(Exception):
    """Two forms of one call disagree: `error` is relative, and above `tolerance`."""

    def __init__(self, law: str, what: str, error: float = math.inf, tolerance: float = 0.0):
        measured = "" if tolerance == 0.0 and math.isinf(error) else f": {error:.2e} is above {tolerance:.0e}"
        super().__init__(f"{law}: {what}{measured}")
        self.law, self.what, self.error, self.tolerance = law, what, error, tolerance


def subject(design: ModelConfig, device: str, dtype: torch.dtype) -> LanguageModel:
    """A model whose every parameter matters: those that start at 0 or 1 are moved off it."""
    model = build(design, device=device, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("gate") or not parameter.any():
                parameter.add_(0.1 * noise(name, parameter))
    return model


def noise(name: str, like: Tensor) -> Tensor:
    """Normal numbers that depend on the name and shape alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator).to(like)


def some_tokens(design: ModelConfig, length: int, device: str, seed: int = 0) -> Tensor:
    """(length,) token ids; or (length, features) vectors where the design reads those."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(design.front, Vectors):
        wide = torch.float32 if device.startswith("mps") else torch.float64
        return torch.randn(length, design.front.features, generator=generator, dtype=wide).to(device)
    return torch.randint(design.vocab, (length,), generator=generator).to(device)


def another(design: ModelConfig, tokens: Tensor) -> Tensor:
    """Inputs that are none of these."""
    return tokens + 1 if isinstance(design.front, Vectors) else (tokens + 1) % design.vocab


def contents(state: ModelState) -> Values:
    """What each row remembers, without the room that its buffers keep for more."""
    values: Values = {}

    def visit(slot: SlotState, name: str) -> None:
        if isinstance(slot, Branches):
            for i, part in enumerate(slot.parts):
                visit(part, f"{name}.{i}")
            return
        for tensor_name, x in slot.tensors().items():
            for row, length in enumerate(state.lengths):
                values[f"row {row}, state {name}.{tensor_name}"] = (
                    x[row, :length] if isinstance(slot, Appended) else x[row]
                )

    for i, slot in enumerate(state.slots):
        visit(slot, str(i))
    return values


def outcome(rows: Sequence[Tensor], state: ModelState | None) -> Values:
    """Logits (t, vocab) of each row, and what it remembers."""
    logits = {f"row {i}, logits": row for i, row in enumerate(rows)}
    return logits if state is None else logits | contents(state)


def leaves(state: ModelState) -> ModelState:
    """A copy of a state that gradients can be taken at."""
    copied = tuple(slot.map(lambda x: x.detach().clone().requires_grad_()) for slot in state.slots)
    return replace(state, slots=copied)


def with_gradients(model: LanguageModel, run: Callable[[], Values], state: ModelState | None = None) -> Values:
    """What `run` gives, and the gradients of a fixed sum of all of it at the parameters and at `state`."""
    values = run()
    loss = sum((x * noise(name, x)).sum() for name, x in values.items())
    inputs = {name: x for name, x in model.named_parameters() if x.requires_grad}
    if state is not None:
        inputs |= {f"initial state {name}": x for name, x in state.tensors().items()}
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)  # type: ignore[arg-type]  # sum of tensors
    named = {
        f"gradient of {name}": torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(inputs.items(), gradients, strict=True)
    }
    return {name: x.detach() for name, x in values.items()} | named


def agree(
    law: str,
    what: str,
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    exactly: bool = False,
    tolerances: tuple[float, float] | None = None,
) -> float:
    """The largest relative error; raises `LawBroken` where one is above its tolerance (or above 0)."""
    if got.keys() != want.keys():
        raise LawBroken(law, f"{what}: {sorted(got.keys() ^ want.keys())[:3]} are in one of the two only")
    sizes = {name: _largest(x) for name, x in want.items()}
    floor = SMALL[_dtype(want)] * max(
        (size for name, size in sizes.items() if name.startswith("gradient")), default=0.0
    )
    tolerances = (0.0, 0.0) if exactly else tolerances or TOLERANCES[_dtype(want)]
    worst = 0.0
    for name, x in want.items():
        if got[name].shape != x.shape:
            raise LawBroken(law, f"{what}, {name}: shape {tuple(got[name].shape)}, expected {tuple(x.shape)}")
        gradient = name.startswith("gradient")
        error = relative(got[name], x, max(sizes[name], floor) if gradient else sizes[name])
        if error > tolerances[gradient]:
            raise LawBroken(law, f"{what}, {name}", error, tolerances[gradient])
        worst = max(worst, error)
    return worst


def _dtype(values: Mapping[str, Tensor]) -> torch.dtype:
    """The narrowest of them."""
    return min((x.dtype for x in values.values()), key=lambda dtype: dtype.itemsize, default=torch.float64)


def relative(got: Tensor, want: Tensor, size: float) -> float:
    """Largest difference over `size`; infinite where anything is not finite."""
    if got.numel() == 0:
        return 0.0
    difference = _largest(got.double() - want.double())
    if not math.isfinite(difference):
        return math.inf
    return difference / size if size > 0 else (0.0 if difference == 0 else math.inf)


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0
