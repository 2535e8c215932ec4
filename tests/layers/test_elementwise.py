"""RG-LRU, HGRN, minGRU, minLSTM and Mamba-1: how they start, and what their gates are at the ends of their range."""

import pytest
import torch
import torch.nn.functional as F

import plait
from plait.layers.elementwise import HGRNLayer, MinGRULayer, MinLSTMLayer
from plait.ops.scan.rg_lru import rg_lru_gates

DESIGN = plait.ModelConfig(vocab=7, dim=64, pattern="R Hg Mg Ml Ma")


@pytest.fixture
def layers():
    return [slot.mixer for slot in plait.build(DESIGN).slots]


def test_an_open_gate_of_an_rg_lru_starts_between_a_tenth_and_a_thousandth(layers):
    a = (-8 * F.softplus(layers[0].Lambda)).exp()
    assert ((a > 0.9) & (a < 0.999)).all()
    assert a.max() - a.min() > 0.08


def test_mamba_starts_as_published(layers):
    mamba = layers[-1]
    assert torch.allclose(mamba.A_log.exp(), torch.arange(1.0, 17.0).expand(128, 16))
    step = F.softplus(mamba.dt_bias)
    assert ((step > 1e-3) & (step < 0.1)).all()
    assert mamba.dt_proj.weight.abs().max() <= mamba.config.dt_rank**-0.5
    assert mamba.config.dt_rank == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rg_lru_gates_at_the_ends_of_their_range(dtype):
    """A decay of exactly 1 or 0 has a share and a gradient all the same."""
    ends = torch.tensor([-1e4, -200.0, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4], dtype=dtype)
    Lambda, forget = (x.flatten() for x in torch.meshgrid(ends, ends, indexing="ij"))
    x, write = torch.ones(1, 1, 1, 1, 64, dtype=dtype), torch.ones(1, 1, 1, 1, 64, dtype=dtype)
    leaves = [x, write, forget.view_as(x), Lambda[None]]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    a, b = rg_lru_gates(*leaves, torch.zeros(1, 1, 1, 1, 1, dtype=torch.bool))
    assert ((a >= 0) & (a <= 1)).all()
    assert torch.allclose(a**2 + (b / torch.sigmoid(write)) ** 2, torch.ones_like(a))
    for gradient in torch.autograd.grad(a.sum() + b.sum(), leaves):
        assert gradient.isfinite().all()


def test_rg_lru_gates_have_the_gradient_they_should():
    torch.manual_seed(0)
    leaves = [torch.randn(1, 3, 1, 2, 2, dtype=torch.float64) for _ in range(3)]
    leaves.append(torch.randn(2, 2, dtype=torch.float64))
    first = torch.tensor([True, False, False]).view(1, 3, 1, 1, 1)
    assert torch.autograd.gradcheck(lambda *x: rg_lru_gates(*x, first), [x.requires_grad_() for x in leaves])
    _, b = rg_lru_gates(*leaves, first)
    assert torch.allclose(
        b[:, 0], torch.sigmoid(leaves[1][:, 0]) * leaves[0][:, 0]
    )  # nothing is held back for what came before


def test_gates_are_those_of_the_papers(layers):
    torch.manual_seed(0)
    _, hgrn, gru, lstm, _ = layers
    assert [type(layer) for layer in (hgrn, gru, lstm)] == [HGRNLayer, MinGRULayer, MinLSTMLayer]
    x, y, c = torch.randn(3, 1, 5, 64)
    f, i = torch.sigmoid(x), torch.sigmoid(y)
    bound = torch.sigmoid(hgrn.gamma)
    assert torch.allclose(bound, torch.full_like(bound, 0.5))
    forget = bound + (1 - bound) * f
    for layer, projected, a, b in (
        (gru, (x, c), 1 - f, f * c),
        (lstm, (x, y, c), f / (f + i), i / (f + i) * c),
        (hgrn, (x, c), forget, (1 - forget) * F.silu(c)),
    ):
        got = layer.gates(*projected)
        assert torch.allclose(got[0], a, atol=1e-6)
        assert torch.allclose(got[1], b, atol=1e-6)


def test_gates_that_are_both_shut_still_sum_to_one(layers):
    shut = torch.full((1, 1, 64), -1e4)
    kept, written = layers[3].gates(shut, shut, torch.ones(1, 1, 64))
    assert torch.equal(kept, torch.full_like(kept, 0.5))
    assert torch.equal(written, kept)


def test_wrong_sizes_say_what_would_be_right():
    for config, match in (
        (lambda: plait.HGRN(lower_bound=1.0), "HGRN.lower_bound must be between"),
        (lambda: plait.MinGRU(width=0), "MinGRU.width must be above 0"),
        (lambda: plait.Mamba(state_dim=-1), "Mamba.state_dim must be above 0"),
        (lambda: plait.RGLRU(heads=3).resolve(64), "RGLRU: heads 3 do not divide dim 64"),
        (
            lambda: plait.RGLRU().resolve(70),
            "RGLRU: dim 70 is not a multiple of 64, so heads and head_dim must be given",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            config()
