"""Latent attention's two forms: what they cost, and that they are one function."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import plait
from plait.layers.context import context_for
from plait.ops.kernels import forced

DIM, LONG = 96, 2048
LAYER = plait.LatentAttention(heads=6, nope_dim=32, rope_dim=16, value_dim=24, rank=64)


def model(**changes):
    design = plait.ModelConfig(vocab=5, dim=DIM, pattern="L", layers={"L": LAYER.replace(**changes)})
    return plait.build(design, dtype=torch.float64)


def flops(module, x, state, seen):
    with forced("reference"), FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x, context_for(x, torch.tensor([seen]), (seen,)), state)
    return counter.get_total_flops()


def test_a_token_after_many_spells_out_no_keys():
    """Beside the weights' own products it reads what is kept twice, once for all heads as keys and once as values."""
    whole, c = model(), LAYER
    module, x = whole.place("L#0"), torch.randn(1, LONG, DIM, dtype=torch.float64)
    (state,) = whole.init_state(1).slots
    with torch.no_grad():
        _, state = module(x, context_for(x, torch.tensor([0]), (0,)), state)
    kept, weights = LONG + 1, sum(p.numel() for name, p in module.named_parameters() if "norm" not in name)
    assert flops(module, x[:, :1], state, LONG) == 2 * weights + 2 * c.heads * kept * 2 * (c.rank + c.rope_dim)
    pool = whole.init_pool(1, 2 * LONG)
    pool.join(plait.ModelState.of((state,), (LONG,), whole.design.hash, whole.device))
    with forced("reference"), FlopCounterMode(display=False) as counter:
        whole(torch.tensor([[3]]), pool.at([0]))
    head = 2 * whole.design.vocab * DIM
    assert counter.get_total_flops() - head == 2 * weights + 2 * c.heads * kept * 2 * (c.rank + c.rope_dim)


def test_many_tokens_spell_keys_out_once():
    """As training does: a prompt that goes on from a state, for which latents would cost more."""
    whole, c, t = model(), LAYER, 512
    module, x = whole.place("L#0"), torch.randn(1, t, DIM, dtype=torch.float64)
    (state,) = whole.init_state(1).slots
    assert not module.absorbs(t)
    weights = sum(p.numel() for name, p in module.named_parameters() if "norm" not in name)
    assert flops(module, x, state, 0) == 2 * weights * t + 2 * c.heads * t * t * (c.key_dim + c.value_dim)


@pytest.mark.parametrize("absorbed", [True, False])
def test_both_forms_are_one_function(absorbed, monkeypatch):
    """Whatever the number of tokens; through a state, with gradients at all weights."""
    whole = model()
    module, x = whole.place("L#0"), torch.randn(2, 70, DIM, dtype=torch.float64)
    want, _ = module(x, context_for(x), None)
    monkeypatch.setattr(type(module), "absorbs", lambda self, tokens: absorbed)
    (state,), parts = whole.init_state(2).slots, []
    for start, part in ((0, x[:, :30]), (30, x[:, 30:])):
        y, state = module(part, context_for(part, torch.tensor([start, start]), (start, start)), state)
        parts.append(y)
    got = torch.cat(parts, 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(want)
    gradients = [torch.autograd.grad((y * weight).sum(), list(module.parameters())) for y in (got, want)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_what_is_kept_of_a_token():
    """The latent and the turned key, whatever the heads are: 80 numbers here, where keys and values would be 6 * 72."""
    assert model().state_spec(1, 1).nbytes == (64 + 16) * 8
    assert model(heads=3).state_spec(1, 1).nbytes == (64 + 16) * 8


def test_defaults_follow_from_dim():
    small, large = (plait.LatentAttention().resolve(dim) for dim in (64, 2048))
    assert (small.heads, small.nope_dim, small.rope_dim, small.value_dim, small.rank) == (1, 64, 32, 64, 64)
    assert (large.heads, large.nope_dim, large.rope_dim, large.value_dim, large.rank) == (16, 128, 64, 128, 512)
