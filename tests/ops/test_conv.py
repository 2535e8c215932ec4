"""The causal convolution: chunked = reference = torch's own."""

import pytest
import torch
import torch.nn.functional as F

from plait.ops.conv import KERNELS, causal_conv
from plait.ops.kernels import forced
from tests.ops.conftest import DOCUMENTS, LENGTHS, forms, packing, run_with_gradients

D = 5


def inputs(length, width=4, batch=2, rows=None, bias=True, state=True):
    torch.manual_seed(length)
    tensors = {
        "x": torch.randn(batch, length, D, dtype=torch.float64),
        "weight": torch.randn(D, width, dtype=torch.float64),
    }
    if bias:
        tensors["bias"] = torch.randn(D, dtype=torch.float64)
    if state:
        tensors["state"] = torch.randn(rows or batch, width - 1, D, dtype=torch.float64)
    return tensors


def both(tensors, close, **call):
    """Every form that fits the call against the reference; gives the reference's answers."""
    *fast, reference = forms(KERNELS, tensors["x"].shape[1])
    with forced(reference):
        want = run_with_gradients(lambda **x: causal_conv(**x, **call), tensors)
    for name in fast:
        with forced(name):
            got = run_with_gradients(lambda **x: causal_conv(**x, **call), tensors)
        for key, x in want.items():
            close(got[key], x)
    return want


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_is_reference(length, width, bias, close):
    for state in (True, False):
        both(inputs(length, width, bias=bias, state=state), close)


@pytest.mark.parametrize("length", [1, 3, 40])
def test_reference_is_torch(length, close):
    tensors = inputs(length, state=False)
    x, weight, bias = tensors.values()
    want = F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=D).mT
    with forced("reference"):
        close(causal_conv(**tensors)[0], want)


def test_state_is_the_last_inputs(close):
    tensors = inputs(2)
    _, state = causal_conv(**tensors)
    close(state, torch.cat([tensors["state"], tensors["x"]], 1)[:, -3:])


@pytest.mark.parametrize("state", [True, False])
def test_packed(state, close):
    tensors = inputs(sum(DOCUMENTS), batch=1, rows=len(DOCUMENTS), state=state)
    packed = both(tensors, close, packing=packing())
    for row, (start, end) in enumerate(packing().bounds):
        document = tensors | {"x": tensors["x"][:, start:end]}
        if state:
            document["state"] = tensors["state"][row : row + 1]
        y, final = causal_conv(**document)
        close(packed["0"][:, start:end], y)
        if state:
            close(packed["1"][row : row + 1], final)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_gradcheck(length):
    tensors = inputs(length, batch=1, state=False)
    with forced("chunked"):
        assert torch.autograd.gradcheck(lambda *x: causal_conv(*x)[0], [x.requires_grad_() for x in tensors.values()])


def test_packed_gradcheck():
    tensors = inputs(9, batch=1, state=False)
    leaves = [x.requires_grad_() for x in tensors.values()]
    with forced("chunked"):
        assert torch.autograd.gradcheck(lambda *x: causal_conv(*x, packing=packing((1, 5, 3)))[0], leaves)
