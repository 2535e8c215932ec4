"""The selective scan: chunked = step = the loop = `scan`, outputs, states and gradients, whatever the gates."""

import pytest
import torch

from plait.ops.kernels import forced
from plait.ops.scan import scan
from plait.ops.selective import KERNELS, chunked, selective_scan
from tests.ops.conftest import DOCUMENTS, LENGTHS, forms, packing, run_with_gradients

D, K = 5, 3


def inputs(length, batch=2, rows=None, state=True, step=0.3, dtype=torch.float64):
    torch.manual_seed(length)
    tensors = {
        "x": torch.randn(batch, length, D, dtype=dtype),
        "dt": step * torch.rand(batch, length, D, dtype=dtype),
        "A": -1 - torch.rand(D, K, dtype=dtype),
        "B": torch.randn(batch, length, K, dtype=dtype),
        "C": torch.randn(batch, length, K, dtype=dtype),
    }
    return tensors | ({"state": torch.randn(rows or batch, D, K, dtype=dtype)} if state else {})


def both(tensors, close, **call):
    """Every form against the reference; gives the reference's answers."""
    *fast, reference = forms(KERNELS, tensors["x"].shape[1])
    with forced(reference):
        want = run_with_gradients(lambda **x: selective_scan(**x, **call), tensors)
    for name in fast:
        with forced(name):
            got = run_with_gradients(lambda **x: selective_scan(**x, **call), tensors)
        for key, x in want.items():
            close(got[key], x)
    return want


@pytest.fixture(params=[True, False], ids=["streams", "one after the other"])
def streams(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(chunked, "BUSY", 0)
    return request.param


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("length", [*LENGTHS, 16, 17, 256, 600])
@pytest.mark.usefixtures("streams")
def test_chunked_is_reference(length, state, close):
    both(inputs(length, state=state), close)


def test_what_streams_there_are(monkeypatch):
    cpu = torch.device("cpu")
    assert chunked._streams(2, 255, D * K, cpu) == (1, 255)
    assert chunked._streams(2, 600, D * K, cpu) == (8, 80)
    assert chunked._streams(1, 2048, chunked.BUSY // 8 + 1, cpu) == (1, 2048)
    count, length = chunked._streams(1, 2000, chunked.BUSY // 8, cpu)
    assert count * length >= 2000 > (count - 1) * length


@pytest.mark.usefixtures("streams")
def test_it_is_the_elementwise_recurrence(close):
    tensors = inputs(300)
    x, dt, A, B, C, state = tensors.values()
    h, last = scan((dt[..., None] * A).exp(), (dt * x)[..., None] * B[:, :, None], state=state)
    y, after = selective_scan(**tensors)
    close(y, (h @ C[..., None])[..., 0])
    close(after, last)


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.usefixtures("streams")
def test_packed(state, close):
    tensors = inputs(sum(DOCUMENTS), batch=1, rows=len(DOCUMENTS), state=state)
    packed = both(tensors, close, packing=packing())
    start = 0
    for row, length in enumerate(DOCUMENTS):
        document = {name: x if name == "A" else x[:, start : start + length] for name, x in tensors.items()}
        if state:
            document["state"] = tensors["state"][row : row + 1]
        alone, final = selective_scan(**document)
        close(packed["0"][:, start : start + length], alone)
        if state:
            close(packed["1"][row : row + 1], final)
        start += length


@pytest.mark.parametrize("step", [0.0, 1e-9, 50.0, 1e4])
@pytest.mark.usefixtures("streams")
def test_extreme_steps(step, close):
    """Nothing forgotten, or everything at every step; and both in turn."""
    tensors = inputs(300, step=step)
    both(tensors, close)
    tensors["dt"][:, ::7] = 1e-6
    tensors["dt"][:, 1::7] = 0.0
    both(tensors, close)


def test_float32_gradients():
    truth = run_with_gradients(selective_scan, inputs(600))
    got = run_with_gradients(selective_scan, {name: x.float() for name, x in inputs(600).items()})
    for name, x in truth.items():
        assert (got[name] - x).abs().max() < 1e-5 * x.abs().max()


@pytest.mark.usefixtures("streams")
def test_gradcheck(monkeypatch):
    """Against finite differences, over segments, streams, what fills none, and documents' ends."""
    monkeypatch.setattr(chunked, "SEGMENT", 2)
    for packed in (None, packing((20, 1, 14))):
        leaves = [x.requires_grad_() for x in inputs(35, batch=1, rows=1 if packed is None else 3).values()]

        def run(*x, packed=packed):
            y, last = selective_scan(*x[:5], state=x[5], packing=packed)
            return y, last, *([selective_scan(*x[:5], packing=packed)[0]] if packed else [])

        with forced("chunked"):
            assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_bfloat16_computes_in_float32():
    tensors = inputs(100, dtype=torch.float32)
    rounded = {name: x.bfloat16() if name in "xBC" else x for name, x in tensors.items()}
    y, state = selective_scan(**rounded)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    exact, _ = selective_scan(**{name: x.float() for name, x in rounded.items()})
    assert torch.equal(y, exact.bfloat16())
