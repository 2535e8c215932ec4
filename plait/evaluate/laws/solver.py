"""Law 12: an iterative solver is within its tolerance of the loop over tokens, or says so and falls back."""

from dataclasses import replace

import torch
from torch import Tensor

from plait.design.model import ModelConfig
from plait.evaluate.laws.compare import LawBroken, agree, noise, subject
from plait.layers.recurrent import RecurrentCell
from plait.ops.kernels import forced
from plait.ops.shooting import RNN, Bound, NotConverged, shooting, tolerance

TOKENS = 300  # on a GPU shorter ones are run as one chunk
STIFF = 2.0  # recurrent weights so much larger: some cells now remember for long, some no longer contract


@torch.no_grad()
def solver(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """12: every recurrent layer, as built and with weights that are hard to solve, with passes enough and with one."""
    worst = 0.0
    for name, cell in subject(design, device, dtype).named_modules():
        if isinstance(cell, RecurrentCell):
            x = cell.project(torch.stack([noise(f"{name} {row}", _tokens(cell)) for row in range(2)]))
            bound, limit = cell.bound(), 1.0 if cell.cell == RNN("relu") else float("inf")  # or it grows without bound
            stiff = (STIFF * bound.recurrent).clamp(-limit, limit)
            for what, one in (("", bound), (", stiff", replace(bound, recurrent=stiff))):
                worst = max(worst, *(_holds(f"{name}{what}", one, x, passes) for passes in (None, 1)))
    return worst


def _tokens(cell: RecurrentCell) -> Tensor:
    return cell.R.new_empty(TOKENS, cell.reads)


def _holds(what: str, cell: Bound, x: Tensor, max_passes: int | None) -> float:
    law, tol = "solver", tolerance(cell, x.dtype)
    start = cell.cell.start_like(x, len(x), torch.promote_types(x.dtype, torch.float32))
    h, final, info = shooting(cell, x, state=start, max_passes=max_passes)
    what += "" if max_passes is None else f", at most {max_passes} pass"
    if not info.fell_back and not info.gap <= tol:
        raise LawBroken(law, f"{what}: a gap of {float(info.gap):.1e} was left without a word")
    with forced("reference"):
        want, last, _ = shooting(cell, x, state=start)
    assert final is not None and last is not None  # a state was given
    values = {"h": h, "final": final}
    try:
        strict = shooting(cell, x, max_passes=max_passes, strict=True)
    except NotConverged:
        if not info.fell_back:
            raise LawBroken(law, f"{what}: strict mode refused what had converged") from None
    else:
        if info.fell_back:
            raise LawBroken(law, f"{what}: strict mode let a fall-back pass")
        agree(law, f"{what}, strict", {"h": strict[0]}, {"h": h}, exactly=True)
    return agree(law, what, values, {"h": want, "final": last})
