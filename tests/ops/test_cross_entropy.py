"""Cross-entropy of rows of logits: the Triton kernel, in Triton's interpreter, beside torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

WITHIN = {
    torch.float32: 3e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}  # of the largest: sums, and outputs of 11 and 8 bits


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


def rows(v, dtype):
    """Cut out of something wider; large ones, equal ones, and one that is almost sure."""
    torch.manual_seed(0)
    y = (8 * torch.randn(6, v + 3)).to(dtype)[:, :v]
    y[1], y[2, 0], y[3] = 7.5, 80, y[3] - 200
    return y, torch.tensor([v - 1, 0, 0, v // 2, -100, -1])


@pytest.mark.parametrize("dtype", WITHIN, ids=str)
@pytest.mark.parametrize("v", [2, 50, 4096, 5001])
def check_rows(v, dtype):
    from plait.ops import cross_entropy_triton

    y, target = rows(v, dtype)
    nats, dy = torch.full((6,), torch.nan), torch.full((6, v), torch.nan, dtype=dtype)
    cross_entropy_triton.run(y, target, nats, dy)
    truth = y.double().requires_grad_()
    want = F.cross_entropy(truth, target.clamp_min(-1), ignore_index=-1, reduction="none")
    (grad,) = torch.autograd.grad(want.sum(), truth)
    assert ((nats - want).abs() <= 2e-6 * want.abs().clamp_min(1)).all()  # float32, whatever the logits are
    assert (dy.double() - grad).abs().max() <= WITHIN[dtype]
    assert dy[4:].eq(0).all()
    assert nats[4:].eq(0).all()
    again = torch.empty(6)
    cross_entropy_triton.run(y, target, again, None)
    assert torch.equal(again, nats)


def check_what_is_not_finite():
    from plait.ops import cross_entropy_triton

    y = torch.zeros(3, 40)
    y[0, 3], y[1, 4], y[2, :39] = torch.nan, torch.inf, -torch.inf
    nats, target = torch.empty(3), torch.tensor([1, 1, 39])
    cross_entropy_triton.run(y, target, nats, None)
    assert nats.isnan().tolist() == [True, True, False]
    assert nats[2] == 0
