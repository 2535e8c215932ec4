"""The selective scan on a GPU: the Triton kernels, in Triton's interpreter, against the loop in float64."""

import pytest
import torch

from plait.ops.kernels import Call
from plait.ops.packing import Packing
from plait.ops.selective import reference, tokens
from tests.ops.conftest import run_with_gradients

WITHIN = 3e-6  # of the largest value: float32, sums over tokens and channels in another order
ROWS = {"rows": (2, (13,)), "packed": (1, (1, 9, 2, 5))}


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that there are several segments and blocks of channels, the last ones cut short."""
    from plait.ops.selective import triton

    monkeypatch.setattr(triton, "SEGMENT", 4)
    monkeypatch.setattr(triton, "NUMBERS", 8)


@pytest.mark.parametrize("step", [0.3, 0.0, 1e4])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def check_outputs_and_gradients(rows, with_state, step):
    (b, lengths), d, k = rows, 5, 3
    packing = Packing.of_lengths(lengths, torch.device("cpu")) if len(lengths) > 1 else None
    torch.manual_seed(0)
    t = sum(lengths)
    tensors = {
        "x": torch.randn(b, t, d),
        "dt": step * torch.rand(b, t, d),
        "A": -1 - torch.rand(d, k),
        "B": torch.randn(b, t, 2 * k)[..., :k],  # cut out of a projection
        "C": torch.randn(b, t, k),
    }
    if with_state:
        tensors["state"] = torch.randn(b if packing is None else len(lengths), d, k)

    def by(form):
        return lambda x, dt, A, B, C, state=None: form.run(x, dt, A, B, C, state=state, packing=packing)

    want = run_with_gradients(by(reference), {name: x.double() for name, x in tensors.items()})
    for name, x in run_with_gradients(by(tokens), tensors).items():
        assert x.isfinite().all()
        assert (x.double() - want[name]).abs().max() <= WITHIN * max(want[name].abs().max(), 1e-3), name


def test_where_it_runs():
    call = Call("cuda", torch.float32, "many", sizes=16, architecture=(9, 0))
    assert tokens.fits(call) is None
    assert "above 128" in str(tokens.fits(call._replace(sizes=129)))
    assert "chosen tokens" in str(tokens.fits(call._replace(at=True)))
    assert "float64" in str(tokens.fits(call._replace(dtype=torch.float64)))
