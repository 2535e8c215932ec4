"""KL between rows of logits: the Triton kernel in Triton's interpreter, and torch's form, beside the formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from plait.ops.kl import kl

WITHIN = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of T: outputs of 24, 11 and 8 bits
NATS = 4e-6  # of logits up to 100, whose differences are summed in float32


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


def rows(v, dtype):
    """Cut out of something wider: large ones, equal ones, one that is almost sure, one that the model thinks impossible, and
    two that are the same in both."""
    torch.manual_seed(0)
    y, theirs = ((6 * torch.randn(7, v + 3)).to(dtype)[:, :v] for _ in range(2))
    y[1], theirs[2, 0], y[3], y[4, 1] = 7.5, 80, y[3] - 100, -90
    theirs[5:] = y[5:]
    return y, theirs, torch.tensor([True, True, True, True, True, True, False])


def truth(y, theirs, T):
    y = y.double().requires_grad_()
    rowwise = F.kl_div(
        (y / T).log_softmax(-1), (theirs.double() / T).log_softmax(-1), log_target=True, reduction="none"
    )
    nats = rowwise.sum(-1) * T**2
    return nats.detach(), torch.autograd.grad(nats.sum(), y)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_a_teacher_rules_out_and_rows_left_out(dtype):
    """A probability of 0 takes nothing, as in F.kl_div with probabilities; a row that does not count may hold anything."""
    y, theirs, _ = rows(50, dtype)
    theirs[0, :20] = -torch.inf
    of_p = F.kl_div(y[:1].double().log_softmax(-1), theirs[:1].double().softmax(-1), reduction="sum")
    theirs[1] = torch.nan
    total, dy = kl(y[:2], theirs[:2], torch.tensor([True, False]), 1.0, True)
    torch.testing.assert_close(total.double(), of_p, rtol=1e-6, atol=0)
    want = y[0].double().softmax(-1) - theirs[0].double().softmax(-1)
    torch.testing.assert_close(dy.double(), torch.stack([want, torch.zeros_like(want)]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("T", [1.0, 2.5])
@pytest.mark.parametrize("dtype", WITHIN, ids=str)
@pytest.mark.parametrize("v", [2, 50, 2048, 5001])
def check_rows(v, dtype, T):
    from plait.ops import kl_triton

    y, theirs, scored = rows(v, dtype)
    nats, dy = torch.full((7,), torch.nan), torch.full((7, v), torch.nan, dtype=dtype)
    kl_triton.run(y, theirs, scored.float(), T, nats, dy)
    want, grad = truth(y, theirs, T)
    assert ((nats - want)[:6].abs() <= NATS * T * want[:6].clamp_min(20)).all()
    assert (dy.double() - grad)[:6].abs().max() <= WITHIN[dtype] * T
    assert dy[6:].eq(0).all() and nats[6:].eq(0).all()
    again, all_of_them = torch.empty(7), torch.empty(7)
    kl_triton.run(y, theirs, scored.float(), T, again, None)
    assert torch.equal(again, nats)
    kl_triton.run(y, theirs, None, T, all_of_them, None)
    assert torch.equal(all_of_them[:6], nats[:6])


def check_what_is_not_finite():
    from plait.ops import kl_triton

    y, theirs, nats = torch.zeros(4, 40), torch.zeros(4, 40), torch.empty(4)
    y[0, 3], theirs[1, 4], y[2, :39], theirs[3, :39] = torch.nan, torch.nan, -torch.inf, -torch.inf
    kl_triton.run(y, theirs, None, 1.0, nats, None)
    assert nats[:2].isnan().all()
    assert nats[2] == torch.inf  # nothing where the teacher sees something
    assert (nats[3] - torch.tensor(40.0).log()).abs() < 1e-6  # what the teacher never says adds nothing


@pytest.mark.parametrize("T", [1.0, 2.5])
@pytest.mark.parametrize("scored", [True, False])
def test_torch(scored, T):
    y, theirs, some = rows(50, torch.float64)
    total, dy = kl(y, theirs, some if scored else None, T, True)
    want, grad = truth(y, theirs, T)
    counts = some.double() if scored else torch.ones(7, dtype=torch.float64)
    torch.testing.assert_close(total, (want * counts).sum())
    torch.testing.assert_close(dy, grad * counts[:, None])
