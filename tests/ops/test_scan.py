"""The elementwise recurrence: chunked = step = the loop, outputs, states and gradients, whatever the gates."""

import pytest
import torch

from plait.ops.kernels import forced
from plait.ops.scan import KERNELS, chunked, scan
from tests.ops.conftest import DOCUMENTS, LENGTHS, forms, packing, run_with_gradients

UNITS = (2, 3)


def inputs(length, batch=2, rows=None, state=True, dtype=torch.float64):
    """a of either sign, b and a state of one call."""
    torch.manual_seed(length)
    tensors = {
        "a": 2 * torch.rand(batch, length, *UNITS, dtype=dtype) - 1,
        "b": torch.randn(batch, length, *UNITS, dtype=dtype),
    }
    return tensors | ({"state": torch.randn(rows or batch, *UNITS, dtype=dtype)} if state else {})


def both(tensors, close, **call):
    """Every form against the reference; gives the reference's answers."""
    *fast, reference = forms(KERNELS, tensors["a"].shape[1])
    with forced(reference):
        want = run_with_gradients(lambda **x: scan(**x, **call), tensors)
    for name in fast:
        with forced(name):
            got = run_with_gradients(lambda **x: scan(**x, **call), tensors)
        for key, x in want.items():
            close(got[key], x)
    return want


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("length", [*LENGTHS, 16, 31, 32, 33, 600])
def test_chunked_is_reference(length, state, close):
    both(inputs(length, state=state), close)


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_packed(state, close):
    tensors = inputs(sum(DOCUMENTS), batch=1, rows=len(DOCUMENTS), state=state)
    packed = both(tensors, close, packing=packing())
    start = 0
    for row, length in enumerate(DOCUMENTS):
        document = {name: x[:, start : start + length] for name, x in tensors.items() if name != "state"}
        if state:
            document["state"] = tensors["state"][row : row + 1]
        alone, final = scan(**document)
        close(packed["0"][:, start : start + length], alone)
        if state:
            close(packed["1"][row : row + 1], final)
        start += length


@pytest.mark.parametrize("size", [2, 4, 64, 256])
def test_chunk_size_changes_nothing(size, close, monkeypatch):
    tensors = inputs(523)
    want = run_with_gradients(scan, tensors)
    monkeypatch.setattr(chunked, "CHUNK", size)
    for key, x in run_with_gradients(scan, tensors).items():
        close(x, want[key])


@pytest.mark.parametrize("a", [0.0, 1.0, -1.0, 1e-3, 1e-30, 1 - 1e-12])
def test_extreme_gates(a, close):
    """Everything kept, everything lost, products that no dtype holds; and runs of them in turn."""
    tensors = inputs(300)
    tensors["a"].fill_(a)
    both(tensors, close)
    tensors["a"][:, ::3] = 1.0
    tensors["a"][:, 1::7] = 0.0
    both(tensors, close)


def test_a_long_memory_in_float32():
    """A state that 4,000 tokens hardly touch: what is lost is rounding, not memory."""
    torch.manual_seed(0)
    a, b, state = 1 - 1e-5 * torch.rand(1, 4000, 3), 1e-4 * torch.randn(1, 4000, 3), torch.randn(1, 3)
    exact, _ = scan(a.double(), b.double(), state=state.double())
    got, _ = scan(a, b, state=state)
    assert (got - exact).abs().max() < 1e-6 * 4000**0.5  # a rounding of 6e-8 each, which add up like a random walk


def test_gradcheck():
    """Against finite differences, over whole chunks, what is left over, and a document's end."""
    documents = (35, 1, 3)
    leaves = [x.requires_grad_() for x in inputs(39, batch=1, rows=3).values()]
    with forced("chunked"):
        assert torch.autograd.gradcheck(lambda a, b, state: scan(a, b, state=state, packing=packing(documents)), leaves)


def test_bfloat16_computes_in_float32():
    tensors = inputs(100, dtype=torch.float32)
    rounded = {name: x.bfloat16() if name != "state" else x for name, x in tensors.items()}
    y, state = scan(**rounded)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    exact, _ = scan(**{name: x.float() for name, x in rounded.items()})
    assert torch.equal(y, exact.bfloat16())


def test_the_last_state_keeps_no_others_in_memory():
    _, last = scan(**inputs(100))
    assert last.untyped_storage().nbytes() == last.nbytes
