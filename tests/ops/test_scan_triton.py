"""The elementwise recurrence on a GPU: the Triton kernels, in Triton's interpreter, against the loop in float64."""

import pytest
import torch

from plait.ops.kernels import Call
from plait.ops.packing import Packing
from plait.ops.scan import reference, tiles
from tests.ops.conftest import run_with_gradients

WITHIN = 2e-6  # of the largest value: float32, sums in another order
ROWS = {"rows": (2, (37,)), "packed": (1, (1, 18, 2, 16))}


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that there are several, the last ones cut short."""
    from plait.ops.scan import triton

    monkeypatch.setattr(triton, "TOKENS", 16)
    monkeypatch.setattr(triton, "CHANNELS", 4)


@pytest.mark.parametrize(("with_state", "gate"), [(False, None), *((True, gate) for gate in (None, 0.0, -1.0, 1e-30))])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def check_outputs_and_gradients(rows, with_state, gate):
    (b, lengths), units = rows, (2, 3)
    packing = Packing.of_lengths(lengths, torch.device("cpu")) if len(lengths) > 1 else None
    torch.manual_seed(0)
    shape = b, sum(lengths), *units
    tensors = {"a": 2 * torch.rand(shape) - 1, "b": torch.randn(2, *shape).movedim(0, -1)[..., 0]}
    if gate is not None:
        tensors["a"][:, ::2] = gate
    if with_state:
        tensors["state"] = torch.randn(b if packing is None else len(lengths), *units)

    def by(form):
        return lambda a, b, state=None: form.run(a, b, state=state, packing=packing)

    want = run_with_gradients(by(reference), {name: x.double() for name, x in tensors.items()})
    for name, x in run_with_gradients(by(tiles), tensors).items():
        assert (x.double() - want[name]).abs().max() <= WITHIN * want[name].abs().max()


@torch.no_grad()
def check_states_after_chosen_tokens():
    a, b, state = torch.rand(2, 20, 3), torch.randn(2, 20, 3), torch.randn(2, 3)
    _, last, states = tiles.run(a, b, state=state, packing=None, at=torch.tensor([0, 19, 5]))
    whole, _ = reference.run(a.double(), b.double(), state=state.double(), packing=None)
    assert (states.double() - whole[:, [0, 19, 5]]).abs().max() <= WITHIN * whole.abs().max()
    assert torch.equal(states[:, 1], last)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)])
def check_nothing(shape):
    from plait.ops.scan import triton

    a, b = torch.rand(2, *shape)
    y = triton.forward(a, b, torch.zeros(shape[0], shape[2]))
    da, db = triton.backward(y, a, y, torch.zeros(shape[0], shape[2]))
    assert y.shape == da.shape == db.shape == shape


def test_where_it_runs():
    call = Call("cuda", torch.float32, "many", architecture=(9, 0))
    assert tiles.fits(call) is None and tiles.fits(call._replace(dtype=torch.bfloat16)) is None
    assert "float64" in str(tiles.fits(call._replace(dtype=torch.float64)))
    assert "several tokens" in str(tiles.fits(call._replace(tokens="one")))
