"""Newton over all tokens: every solver = the loop, in as many passes as theory says; scans = loops."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from plait.ops.shooting import GRU, LSTM, RNN, SLSTM, Cell, reference

with pytest.MonkeyPatch.context() as patch:  # as Python does for a script in that folder
    patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import solvers
    from baselines import linear, newton
    from baselines.newton import SOLVERS, solve

HEADS, K, T = 2, 3, 37  # an odd length has a leftover step at some level of the scan, whatever the level
CELLS = {"gru": GRU(), "peephole": LSTM(coupled=True, peephole=True), "slstm": SLSTM()}
FORMS = ("diagonal", "heads", "dense")
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Affine(Cell):
    """Two states that mix, and a recurrence: linear, so one step of Newton's method is exact."""

    states = ("h", "c")

    def step(self, x, m, s, w):
        c = 0.5 * s[1] - 0.3 * s[0] + x[0]
        return 0.4 * s[0] + c + m[0], c


def call(cell, form="diagonal", length=T, scale=1.0, dtype=torch.float64):
    """A bound cell, inputs and an initial state; at scale 1 the recurrence contracts."""
    torch.manual_seed(0)
    g, heads, k = len(cell.inputs), *((1, HEADS * K) if form == "dense" else (HEADS, K))
    shape, size = ((k,), 0.5) if form == "diagonal" else ((k, k), k**-0.5)
    bound = cell.bind(
        scale * size * torch.randn(g, heads, *shape, dtype=dtype),
        bias=0.3 * torch.randn(g, heads, k, dtype=dtype),
        weights=tuple(0.3 * torch.randn(heads, k, dtype=dtype) for _ in cell.weights),
    )
    x = torch.randn(2, length, g, heads, k, dtype=dtype)
    return bound, x, 0.5 * torch.randn(2, len(cell.states), heads, k, dtype=dtype)


def check(got, want):
    """A residual of TOLERANCE at each step adds up over what a state remembers: less than 100 steps here."""
    states, _, gap = got
    assert gap <= TOLERANCE
    assert (states - want).abs().max() <= 100 * TOLERANCE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_equals_the_loop(solver, cell, form):
    bound, x, h0 = call(cell, form)
    want, _ = reference.run(bound, x, h0, None)
    check(solve(bound, x, h0, solver, TOLERANCE, 100), want)


@pytest.mark.parametrize("form", FORMS)
def test_deer_needs_one_pass_where_the_step_is_affine(form):
    bound, x, h0 = call(Affine(), form)
    want, _ = reference.run(bound, x, h0, None)
    got = solve(bound, x, h0, "deer", TOLERANCE)
    check(got, want)
    assert got[1] == 1


@pytest.mark.parametrize("solver", ["deer", "elk"])
def test_newton_converges_quadratically(solver):
    """Once a residual is small its square comes next, so from 1e-3 four passes are enough for 1e-12; quasi-Newton has no such
    law, and gains a constant factor a pass."""
    bound, x, h0 = call(GRU(), "heads", scale=1.5)
    near = solve(bound, x, h0, solver, 1e-3)[1]
    assert solve(bound, x, h0, solver, TOLERANCE)[1] <= near + 4
    assert solve(bound, x, h0, f"quasi_{solver}", TOLERANCE)[1] > near + 4


@pytest.mark.parametrize("solver", ["deer", "quasi_deer"])
def test_a_pass_a_token_is_exact_in_chaos(solver):
    """Products of Jacobians leave the range of float32 here; still one more state is exact after each pass."""
    bound, x, h0 = call(RNN(), "dense", length=100, scale=12, dtype=torch.float32)
    states, passes, gap = solve(bound, x, h0, solver, 0.0, 50)
    assert states.isfinite().all()
    assert passes == 50 and gap > 0.1  # and says so
    assert residual(bound, x, h0, states)[:, :50].max() == 0
    _, passes, gap = solve(bound, x, h0, solver, 0.0)
    assert gap == 0 and passes <= 100


def residual(bound, x, h0, states):
    before = torch.cat([h0[:, None], states[:, :-1]], 1).transpose(0, 1)
    return (bound.step(x.transpose(0, 1), before).transpose(0, 1) - states).abs()


@pytest.mark.parametrize("solver", ["elk", "quasi_elk"])
@pytest.mark.parametrize("form", FORMS)
def test_elk_stays_finite_in_chaos(solver, form):
    bound, x, h0 = call(LSTM(), form, length=100, scale=8, dtype=torch.float32)
    states, passes, gap = solve(bound, x, h0, solver, 1e-6, 10)
    assert states.isfinite().all() and states.abs().max() < newton.LARGEST
    assert passes == 10 or gap <= 1e-6
    torch.testing.assert_close(gap, (residual(bound, x, h0, states) / states.abs().clamp(min=1)).max())


@pytest.mark.parametrize("matrix", [False, True], ids=["numbers", "matrices"])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 33])
def test_scan_is_the_loop(length, matrix):
    torch.manual_seed(length)
    b = torch.randn(length, 2, 3, dtype=torch.float64)
    J = torch.randn(length, 2, 3, *([3] if matrix else []), dtype=torch.float64) / 2
    v, want = torch.zeros_like(b[0]), []
    for step in range(length):
        v = linear.apply(J[step], v) + b[step]
        want.append(v)
    torch.testing.assert_close(linear.scan(J, b), torch.stack(want))


@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("form", ["diagonal", "heads"])
def test_filter_is_kalmans_loop(form, damping):
    """Predict, then update with gain P / (P + 1 / lambda), one token after the other."""
    torch.manual_seed(0)
    m = 1 if form == "diagonal" else 3
    J, r = torch.randn(T, 2, m, m, dtype=torch.float64), torch.randn(T, 2, m, dtype=torch.float64)
    eye = torch.eye(m, dtype=torch.float64)
    mean, cov, want = torch.zeros(2, m, 1, dtype=torch.float64), torch.zeros(2, m, m, dtype=torch.float64), []
    for step in range(T):
        mean, cov = J[step] @ mean + r[step][..., None], J[step] @ cov @ J[step].mT + eye
        rest = torch.linalg.inv(eye + damping * cov)
        mean, cov = rest @ mean, rest @ cov
        want.append(mean[..., 0])
    gain = torch.full((2, 1), damping / (1 + damping), dtype=torch.float64)
    got = newton.filtered(J[..., 0] if m == 1 else J, r, gain)
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_benchmark_compares_equals():
    """Every solver ends in the loop's outputs, those that give up too."""
    for bound, _, _ in (call(GRU()), call(RNN(), "dense", scale=12)):
        x = torch.randn(1, 64, *bound.recurrent.shape[:3], dtype=torch.float64)
        want = reference.run(bound, x, bound.cell.start_like(x, 1), None)[0][:, :, 0]
        rows = solvers.compare(bound, x, want, rounds=1)
        assert list(rows) == list(solvers.SOLVERS)
        for row in rows.values():
            assert row["error"] <= 100 * solvers.TOLERANCE and (row["fell_back"] or row["gap"] <= solvers.TOLERANCE)
