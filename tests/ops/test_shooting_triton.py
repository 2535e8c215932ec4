"""The Triton kernels in Triton's interpreter, against the loop in float64.

The interpreter has to be chosen before triton is first imported, so the checks run in a process of their own.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.ops.kernels import Call
from plait.ops.packing import Packing
from plait.ops.shooting import reference, sizes_of
from plait.ops.shooting.cells import EMPTY, GRU, LSTM, RNN, SLSTM, Bound, Cell

CELLS = {
    "tanh": RNN(),
    "relu": RNN("relu"),
    "gru": GRU(),
    "lstm": LSTM(),
    "lstm coupled": LSTM(coupled=True),
    "lstm peephole": LSTM(peephole=True),
    "lstm coupled peephole": LSTM(coupled=True, peephole=True),
    "slstm": SLSTM(),
}
KINDS = ("sequential", "grid")
HARD = {"C": 4, "BD": 4}


def call(bound: Bound, x: Tensor) -> Call:
    return Call("cuda", x.dtype, "many", sizes=sizes_of(bound, x, "shooting"))


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


@dataclass
class Problem:
    """A call: `bias` on the first gate, `scale` of the recurrent weights; head-wise projections lay heads outermost."""

    cell: Cell
    t: int = 17
    b: int = 1
    heads: int = 1
    k: int = 3
    lengths: tuple[int, ...] | None = None
    headwise: bool = False
    dtype: torch.dtype = torch.float32
    bias: float = 0.0
    scale: float = 0.5
    gradients: tuple[bool, bool] = (True, True)  # at h, at the final states

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        g, s = len(self.cell.inputs), len(self.cell.states)
        self.packing = None
        if self.lengths is not None:
            self.packing = Packing.of_lengths(self.lengths, torch.device("cpu"))
            self.b, self.t = 1, sum(self.lengths)
        x = normal(self.heads, self.b, self.t, g, self.k).permute(1, 2, 3, 0, 4)
        x = x if self.headwise else x.contiguous()
        x[:, :, 0] += self.bias
        self.x = x.to(self.dtype)
        n = self.b if self.lengths is None else len(self.lengths)
        self.h0 = normal(n, s, self.heads, self.k) / 2
        if isinstance(self.cell, SLSTM):
            self.h0[0, 2] = EMPTY
        weights = tuple(normal(self.heads, self.k) / 2 for _ in self.cell.weights)
        self.bound = self.cell.bind(normal(g, self.heads, self.k) * self.scale, weights=weights)
        self.dh = normal(self.b, self.t, self.heads, self.k).to(self.dtype) if self.gradients[0] else None
        self.dfinal = normal(n, s, self.heads, self.k) if self.gradients[1] else None

    def run(self, tol: float, max_passes: int) -> tuple[list[Tensor], Tensor]:
        from plait.ops.shooting import triton

        assert triton.supports(call(self.bound, self.x)) is None
        h, rest, final, info = triton.forward(self.bound, self.x, self.h0, self.packing, tol, max_passes)
        assert h.is_contiguous() and h.dtype == self.dtype and rest.is_contiguous()
        dx, dh0, rest_of_it = triton.backward(self.bound, self.x, self.h0, h, rest, self.dh, self.dfinal, self.packing)
        assert dx.dtype == self.dtype and dx.stride() == torch.empty_like(self.x).stride()
        return [h, rest, final, dx, dh0, *rest_of_it], info

    def truth(self) -> list[Tensor]:
        x, h0, *tensors = (z.double().requires_grad_() for z in (self.x, self.h0, *self.bound.tensors()))
        states, final = reference.run(self.bound.with_tensors(tensors), x, h0, self.packing)
        loss = 0.0
        if self.dh is not None:
            loss = loss + (states[:, :, 0] * self.dh).sum()
        if self.dfinal is not None:
            loss = loss + (final * self.dfinal).sum()
        assert isinstance(loss, Tensor)
        gradients = torch.autograd.grad(loss, [x, h0, *tensors])
        return [states.detach()[:, :, 0], states.detach()[:, :, 1:], final.detach(), *gradients]


def forced(kind: str, **changes: Any):
    from plait.ops.shooting import triton

    sizes = {"sequential": {"U": 4}, "grid": {"L": 5, "U": 2, "W": 2, "C": 2}}[kind]
    return triton.forced_plan(triton.Plan(kind, **(HARD | sizes | changes)))  # type: ignore[arg-type]


def agree(problem: Problem, kind: str, tol: float = 1e-6, max_passes: int = 5, within: float = 1e-5, **changes: Any):
    with forced(kind, **changes):
        got, info = problem.run(tol, max_passes)
    for one, want in zip(got, problem.truth(), strict=True):
        assert one.shape == want.shape
        assert one.isfinite().all()
        if one.numel():
            assert (one.double() - want).abs().max() <= within * max(float(want.abs().max()), 0.01)
    return info.tolist()


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("kind", KINDS)
def check_every_cell(name: str, kind: str):
    passes, gap, fell_back = agree(Problem(CELLS[name], lengths=(1, 2, 8)), kind)
    assert gap <= 1e-6 and not fell_back
    assert passes == 1 if kind == "sequential" else 1 < passes <= 5


@pytest.mark.parametrize("length", [1, 2, 23])
@pytest.mark.parametrize("kind", KINDS)
def check_lengths(length: int, kind: str):
    agree(Problem(GRU(), length, b=2 if length < 23 else 1), kind)


@pytest.mark.parametrize("headwise", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def check_layouts(headwise: bool, kind: str):
    """Two blocks of channels in each of two heads, which lie far apart; or two blocks of all channels."""
    agree(Problem(LSTM(True, True), 7, heads=2, k=3, headwise=headwise), kind, BD=2)


@pytest.mark.parametrize("kind", KINDS)
def check_blocks_without_a_tail(kind: str):
    agree(Problem(GRU(), 20, k=4), kind, BD=2)


@pytest.mark.parametrize("gradients", [(True, False), (False, True)])
@pytest.mark.parametrize("kind", KINDS)
def check_one_gradient_alone(gradients: tuple[bool, bool], kind: str):
    agree(Problem(LSTM(True), 7, gradients=gradients), kind)


@pytest.mark.parametrize("kind", KINDS)
def check_long_memory(kind: str):
    """Nothing is forgotten inside a chunk, so that burn-in is no help and the Jacobians have to do it."""
    passes, gap, fell_back = agree(Problem(GRU(), 22, bias=-6.0), kind)
    assert passes <= 5 and not fell_back


@pytest.mark.parametrize("cell", [GRU(), LSTM()])
@pytest.mark.parametrize("kind", KINDS)
def check_wild_weights(cell: Cell, kind: str):
    agree(Problem(cell, 12, scale=10.0), kind, within=1e-4)


def check_a_grid_that_never_closes_falls_back():
    passes, gap, fell_back = agree(Problem(LSTM(), lengths=(1, 9, 4)), "grid", tol=-1.0, max_passes=2)
    assert (passes, fell_back) == (2, 1)


def check_only_open_blocks_fall_back():
    """The first document is one chunk and has no gap; the second one's is there after one pass."""
    passes, gap, fell_back = agree(Problem(GRU(), lengths=(3, 12)), "grid", tol=0.0, max_passes=1)
    assert (passes, gap, fell_back) == (1, 0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def check_narrow_inputs(dtype: torch.dtype, kind: str):
    agree(Problem(GRU(), 12, dtype=dtype), kind, within=2e-2 if dtype == torch.bfloat16 else 3e-3)


def check_plans():
    from plait.ops.shooting.triton import plan

    kinds = [
        plan(*shape, sms=132).kind for shape in ((8, 2048, 4096), (32, 2048, 2048), (1, 256, 131072), (1, 64, 100))
    ]
    assert kinds == ["sequential", "sequential", "grid", "sequential"]
    for rows, units, longest in ((1, 2048, 32768), (1, 256, 131072), (1, 32, 1000)):
        chosen = plan(rows, units, longest, 132)
        assert chosen.kind == "grid" and chosen.L % chosen.U == 0 and chosen.W <= chosen.L


def check_what_is_not_supported():
    from plait.ops.shooting import triton

    def supports(bound, x):
        return triton.supports(call(bound, x))

    bound, x = Problem(GRU()).bound, Problem(GRU()).x
    assert "matrix" in str(supports(GRU().bind(torch.zeros(3, 1, 3, 3)), x))
    assert "bias" in str(supports(Bound(GRU(), bound.recurrent, bound.recurrent), x))
    assert "float64" in str(supports(bound, x.double()))
    assert "contiguous" in str(supports(bound, x.transpose(2, 4)))
    assert "no tokens" in str(supports(bound, x[:, :0]))

    class Other(GRU):
        pass

    assert "Other" in str(supports(Bound(Other(), bound.recurrent), x))
