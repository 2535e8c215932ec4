"""16-bit products on a processor without instructions for them: float32's, rounded once; of few rows and elsewhere torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import plait
from plait.ops import products


class Dtypes(TorchFunctionMode):
    """Of what products with weights are called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, torch.bmm, torch.baddbmm):
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["slow", "fast"])
def slow(request, monkeypatch):
    monkeypatch.setattr(products, "SLOW", dict.fromkeys(products.SLOW, lambda: request.param))
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [(1, 1), (7,), (2, 4), (64,)])
def test_many_rows_are_widened_where_that_is_quicker(slow, dtype, rows):
    torch.manual_seed(0)
    x, w, b = torch.randn(*rows, 40).to(dtype), torch.randn(30, 40).to(dtype), torch.randn(30).to(dtype)
    x.requires_grad_(), w.requires_grad_(), b.requires_grad_()
    wide = slow and dtype != torch.float32 and x.numel() >= 8 * 40
    with Dtypes() as called:
        y = products.linear(x, w, b)
    assert called.seen == [torch.float32 if wide else dtype]
    truth = F.linear(x.double(), w.double(), b.double())
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), truth, rtol=eps, atol=64 * eps)  # float32: 40 products up to 10, summed
    if wide:
        assert torch.equal(y, F.linear(x.float(), w.float(), b.float()).to(dtype))
    for got, want in zip(*(torch.autograd.grad(out.sum(), (x, w, b)) for out in (y, truth)), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want.double(), rtol=0.02, atol=0.1)  # sums of 16-bit gradients


@pytest.mark.parametrize("pattern", ["AE", "L", "R"])
def test_layers_use_them(slow, pattern):
    """Projections, the head, experts, keys and values out of latents, and products within heads."""
    design = plait.ModelConfig(vocab=50, dim=128, pattern=pattern)
    model = plait.build(design, dtype=torch.bfloat16)
    with Dtypes() as called, torch.no_grad():
        model(torch.randint(50, (2, 40)))
    assert (torch.bfloat16 in called.seen) != slow  # the router's are float32 anyway


def test_autocast_decides_for_itself(monkeypatch):
    monkeypatch.setattr(products, "SLOW", dict.fromkeys(products.SLOW, lambda: True))
    x, w = torch.randn(20, 8, dtype=torch.bfloat16), torch.randn(8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), Dtypes() as called:
        products.linear(x, w)
    assert called.seen == [torch.bfloat16]
