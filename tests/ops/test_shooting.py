"""The public solver of nonlinear recurrences against the loop over tokens, and what it says of itself."""

import pickle
from dataclasses import dataclass

import pytest
import torch

from plait.ops.kernels import forced
from plait.ops.packing import Packing, chunks
from plait.ops.shooting import GRU, LSTM, RNN, SLSTM, NotConverged, cells, chunked, reference, shooting

CELLS = [RNN(), RNN("relu"), GRU(), LSTM(), LSTM(peephole=True), LSTM(coupled=True, peephole=True), SLSTM()]
MIXES = {
    "diagonal": (3, None),
    "small heads": (3, 4),
    "large heads": (2, 20),
    "dense": (1, 30),
}  # heads, and k where it is a matrix
TOLERANCE = 1e-10  # float64; measured 5e-14, gradients through 130 steps included


def problem(cell, mix="diagonal", batch=2, tokens=70, scale=0.5, dtype=torch.float64, seed=0):
    """A bound cell, inputs and initial states, all of which take gradients."""
    torch.manual_seed(seed)
    g, (heads, matrix) = len(cell.inputs), MIXES[mix]
    k = matrix or 5
    shape = (g, heads, k) if matrix is None else (g, heads, k, k)
    recurrent = torch.randn(shape, dtype=dtype) * (scale if matrix is None else scale / k**0.5)
    bias, x = torch.randn(g, heads, k, dtype=dtype) / 10, torch.randn(batch, tokens, g, heads, k, dtype=dtype)
    weights = tuple(torch.randn(heads, k, dtype=dtype) / 3 for _ in cell.weights)
    h0 = torch.randn(batch, len(cell.states), heads, k, dtype=dtype) / 3
    if not torch.is_inference_mode_enabled():
        for leaf in (recurrent, bias, x, h0, *weights):
            leaf.requires_grad_()
    return cell.bind(recurrent, bias=bias, weights=weights), x, h0


def everything(cell, x, h0, **options):
    """Outputs, last states and the gradients of a fixed sum of both at everything."""
    h, final, info = shooting(cell, x, state=h0, **options)
    torch.manual_seed(1)
    loss = (h * torch.randn_like(h)).sum() + (final * torch.randn_like(final)).sum()
    return [h, final, *torch.autograd.grad(loss, [x, h0, *cell.tensors()])], info


def apart(got, want):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("cell", CELLS, ids=repr)
def test_it_is_the_loop(cell, mix):
    got, info = everything(*problem(cell, mix))
    with forced("reference"):
        want, _ = everything(*problem(cell, mix))
    assert apart(got, want) < TOLERANCE
    assert not info.fell_back
    assert info.passes > 0
    assert info.gap <= 1e-12


@pytest.mark.parametrize("cell", [GRU(), SLSTM()], ids=repr)
def test_packed_documents_are_the_documents_alone(cell):
    lengths = (1, 40, 7, 130, 2)
    bound, x, _ = problem(cell, batch=1, tokens=sum(lengths))
    _, _, h0 = problem(cell, batch=len(lengths))
    got, _ = everything(bound, x, h0, packing=Packing.of_lengths(lengths, x.device))
    with forced("reference"):
        want, _ = everything(bound, x, h0, packing=Packing.of_lengths(lengths, x.device))
    assert apart(got, want) < TOLERANCE


@torch.no_grad()
def test_after_k_passes_the_first_k_chunks_are_exact():
    bound, x, h0 = problem(GRU(), scale=20.0, tokens=128)  # nothing contracts
    layout = chunks(*x.shape[:2], 16, None)
    truth = layout.by_step(reference.run(bound, x, h0, None)[0])
    for passes in (1, 2, 3):
        starts, states = chunked.following(torch.zeros_like(layout.by_step(x)[-1, :, :1]), h0, layout), None
        for _ in range(passes):
            states = chunked.run(bound, layout.by_step(x), starts)
            starts = chunked.following(states[-1], h0, layout)
        assert states is not None
        torch.testing.assert_close(states[:, : 2 * passes], truth[:, : 2 * passes], rtol=0, atol=1e-12)


def test_what_does_not_contract_falls_back_and_says_so():
    bound, x, h0 = problem(RNN(), "large heads", scale=6.0, tokens=200, dtype=torch.float32)
    h, _, info = shooting(bound, x, state=h0)
    assert info.fell_back
    states, _ = reference.run(bound, x, h0, None)
    torch.testing.assert_close(h[:, :20], states[:, :20, 0], rtol=0, atol=1e-4)  # chaos parts any two roundings later
    with pytest.raises(NotConverged, match=r"RNN: a gap of .* passes, above tol 2e-06"):
        shooting(bound, x, state=h0, strict=True)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("mix", ["diagonal", "dense"])
@pytest.mark.parametrize("cell", CELLS, ids=repr)
def test_one_pass_is_too_few_and_the_answer_is_right_all_the_same(cell, mix, packed):
    """With a dense matrix torch's own kernels are the loop, where they have the cell."""
    lengths = (3, 90, 47) if packed else None
    bound, x, h0 = problem(cell, mix, 1 if packed else 2, 140)
    packing = None if lengths is None else Packing.of_lengths(lengths, x.device)
    if lengths is not None:
        _, _, h0 = problem(cell, mix, len(lengths))
    got, info = everything(bound, x, h0, packing=packing, max_passes=1)
    with forced("reference"):
        want, _ = everything(bound, x, h0, packing=packing)
    assert info.fell_back
    assert info.gap > 1e-12
    assert apart(got, want) < TOLERANCE


def test_gradients_that_do_not_settle_are_taken_token_by_token_and_say_so():
    bound, x, h0 = problem(GRU(), "large heads")
    states, _ = reference.run(bound, x, h0, None)
    grad = torch.randn_like(states[:, :, 0])
    want = torch.autograd.grad((states[:, :, 0] * grad).sum(), [x, h0, *bound.tensors()])
    with pytest.warns(RuntimeWarning, match="GRU: gradients do not settle in chunks"), torch.no_grad():
        got = chunked.backward(bound, x, h0, states, grad, None, None, 0.0, 1, chunked.TORCH)
    assert apart(got, want) < TOLERANCE


def test_the_loop_can_be_asked_for():
    bound, x, h0 = problem(LSTM(coupled=True))
    got, info = everything(bound, x, h0, solver="sequential")
    with forced("reference"):
        want, _ = everything(bound, x, h0)
    assert apart(got, want) < TOLERANCE
    assert info.passes == 1 and info.gap == 0 and not info.fell_back


@pytest.mark.parametrize("mix", ["diagonal", "small heads"])
def test_it_runs_in_inference_mode(mix):
    with torch.inference_mode():
        bound, x, h0 = problem(GRU(), mix)
        assert int(shooting(bound, x, state=h0)[2].passes) > 2  # a Jacobian was needed


@dataclass(frozen=True)
class Checked(GRU):
    """A cell with checks of its own, in place of what `Cell` does on construction."""

    slope: float = 1.0

    def __post_init__(self):
        assert self.slope > 0


def test_a_cell_may_check_itself():
    bound, x, h0 = problem(Checked())
    torch.testing.assert_close(shooting(bound, x, state=h0)[0], reference.run(bound, x, h0, None)[0][:, :, 0])


@pytest.mark.parametrize("cell", [GRU(), LSTM(coupled=True), Checked(slope=2.0)])
def test_a_cell_that_comes_from_another_process_is_known(cell, monkeypatch):
    written = pickle.dumps(cell)
    monkeypatch.setattr(cells, "KNOWN", {})
    read = pickle.loads(written)
    assert read == cell and {read.key: read} == cells.KNOWN


@pytest.mark.parametrize(("cell", "length"), [(GRU(), 200), (GRU(), 5), (LSTM(), 5)])  # many chunks; one
def test_it_compiles_as_one_graph(cell, length):
    bound, x, h0 = problem(cell, "small heads", batch=1, tokens=length)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, h0: shooting(bound, x, state=h0)[:2], fullgraph=True, backend="aot_eager")
    h, final = compiled(x, h0)  # which was never run without the compiler
    want, _ = everything(bound, x, h0)
    torch.testing.assert_close(h, want[0])
    torch.testing.assert_close(torch.autograd.grad(h.sum() + final.sum(), x), _sums(bound, x, h0))


def _sums(bound, x, h0):
    h, final, _ = shooting(bound, x, state=h0)
    return torch.autograd.grad(h.sum() + final.sum(), x)


def test_bfloat16_is_computed_in_float32():
    bound, x, h0 = problem(GRU(), dtype=torch.float32)
    h, final, info = shooting(bound, x.bfloat16(), state=h0)
    assert h.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    states, _ = reference.run(bound, x.bfloat16().float(), h0, None)
    torch.testing.assert_close(h.float(), states[:, :, 0], rtol=0, atol=2**-8)  # half a rounding of what is below 1
    assert info.gap <= 2**-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": lambda x: x[:, :, :2]},
            r"GRU: x must be \(batch, time, 3, 3, 5\), a number per unit for each of z, r, c",
        ),
        ({"solver": "deer"}, "unknown solver 'deer'; known: sequential, shooting"),
        ({"max_passes": 0}, "max_passes must be a whole number, 1 or above, got 0"),
        ({"max_passes": 1.5}, "max_passes must be a whole number, 1 or above, got 1.5"),
        ({"tol": float("nan")}, "tol must be above 0, got nan"),
        (
            {"state": lambda h0: h0[:, 0]},
            r"GRU: state must be \(2, 1, 3, 5\), a number per unit for each of h; got \(2, 3, 5\)",
        ),
    ],
)
def test_wrong_calls_say_what_would_be_right(change, message):
    bound, x, h0 = problem(GRU())
    x, state = change.get("x", lambda x: x)(x), change.get("state", lambda h0: h0)(h0)
    change = {name: value for name, value in change.items() if name not in ("x", "state")}
    with pytest.raises(ValueError, match=message):
        shooting(bound, x, state=state, **change)


def test_a_cell_without_its_weights_is_refused():
    with pytest.raises(ValueError, match="LSTM needs the weights"):
        LSTM(peephole=True).bind(torch.zeros(4, 1, 3))
    with pytest.raises(ValueError, match=r"GRU: recurrent weights must be \(3, heads, k\)"):
        GRU().bind(torch.zeros(4, 1, 3))
