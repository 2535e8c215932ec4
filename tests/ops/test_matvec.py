"""A matrix times one row: the Triton kernel, in Triton's interpreter, beside float64; and who is given to it."""

import pytest
import torch
import torch.nn.functional as F

from plait.ops import matvec

WITHIN = {torch.float32: 2e-6, torch.float16: 1e-3}  # of the largest: sums of 3,000 numbers, outputs of 24 and 11 bits


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


@pytest.mark.parametrize("dtype", WITHIN, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (37, 20), (1100, 130), (3, 3000)])
def check_products(n, k, bias, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, k).to(dtype), torch.randn(n, k).to(dtype)
    shift = torch.randn(n).to(dtype) if bias else None
    y = matvec.linear(x, weight, shift)
    want = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
    assert y.shape == want.shape
    assert (y.double() - want).abs().max() <= WITHIN[dtype] * max(1.0, float(want.abs().max()))


def test_who_is_given_to_it(monkeypatch):
    """Products of one row, however they are asked for; no others."""
    given = []
    monkeypatch.setattr(matvec, "fits", lambda input, weight, bias=None: input.numel() == input.shape[-1])
    monkeypatch.setattr(
        matvec, "linear", lambda input, weight, bias=None: given.append(len(weight)) or F.linear(input, weight)
    )
    layer, x = torch.nn.Linear(3, 5, bias=False), torch.randn(1, 1, 3)
    with matvec.OneRow():
        layer(x), F.linear(x, weight=layer.weight), F.linear(x.expand(2, 1, 3), layer.weight), x @ layer.weight.T
    assert given == [5, 5]
    layer(x)
    assert given == [5, 5]


@torch.no_grad()
def test_what_does_not_fit():
    x, weight = torch.randn(1, 3), torch.randn(5, 3)
    assert not matvec.fits(x, weight)  # not on a GPU
