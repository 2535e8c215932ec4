"""transformers' xLSTM layer, in plain torch: the same weights, outputs, states and gradients, whole and step by step."""

import pytest
import torch
from transformers.models.xlstm.configuration_xlstm import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

import plait
from plait.layers import context_for
from plait.state import Recurrent

DIM, HEADS, T = 64, 4, 150
# their states and norms are float32 whatever the model's dtype
TOLERANCE = 1e-5


def twins():
    """Their layer, ours with the same weights, and which of theirs ours are made of."""
    torch.manual_seed(0)
    config = xLSTMConfig(hidden_size=DIM, num_heads=HEADS, num_hidden_layers=1, mode="inference")
    theirs = xLSTMLayer(config).double()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.3)
    layer = plait.MLSTM(heads=HEADS)
    design = plait.ModelConfig(vocab=9, dim=DIM, pattern="X", layers={"X": layer}, norm=plait.RMSNorm(eps=1e-6))
    ours = plait.build(design, dtype=torch.float64).slots[0].mixer
    parts = {
        "in_proj.weight": ("q.weight", "k.weight", "v.weight", "ogate_preact.weight"),
        "gates_proj.weight": ("igate_preact.weight", "fgate_preact.weight"),
        "i_bias": ("igate_preact.bias",),
        "f_bias": ("fgate_preact.bias",),
        "norm.weight": ("multihead_norm.weight",),
        "out_proj.weight": ("out_proj.weight",),
    }
    tensors = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        parameter.data.copy_(torch.cat([tensors[part].data for part in parts[name]]))
    return theirs, ours, {name: [tensors[part] for part in parts[name]] for name, _ in ours.named_parameters()}


def close(got, want):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


def nothing():
    return Recurrent(torch.zeros(2, HEADS, DIM // HEADS + 2, DIM // HEADS // 2).double(), torch.zeros(2, 0, DIM))


def test_the_same_layer():
    theirs, ours, tensors = twins()
    x = torch.randn(2, T, DIM, dtype=torch.float64, requires_grad=True)
    want, (C, n, m) = theirs(x)
    got, state = ours(x, context_for(x), nothing())
    close(got, want)
    close(state.s[:, :, :-2], C.mT.double())
    close(state.s[:, :, -2], n.double())
    close(state.s[:, :, -1, :1], m.reshape(2, HEADS, 1).double())
    direction = torch.randn_like(want)
    mine = torch.autograd.grad((got * direction).sum(), [x, *ours.parameters()])
    flat = [x, *(p for parts in tensors.values() for p in parts)]
    their = iter(torch.autograd.grad((want * direction).sum(), flat))
    close(mine[0], next(their))
    for gradient, parts in zip(mine[1:], tensors.values(), strict=True):
        close(gradient, torch.cat([next(their) for _ in parts]))


@torch.no_grad()
def test_step_by_step():
    theirs, ours, _ = twins()
    x = torch.randn(2, 20, DIM, dtype=torch.float64)
    kept, state = None, nothing()
    for t in range(20):
        want, kept = theirs(x[:, t : t + 1], kept)
        got, state = ours(x[:, t : t + 1], context_for(x[:, t : t + 1]), state)
        close(got, want)


def test_a_state_starts_where_theirs_does():
    assert plait.build({"vocab": 9, "dim": DIM, "pattern": "X"}).init_state().nbytes == 4 * 66 * 32


@pytest.mark.parametrize("heads", [3])
def test_sizes_that_do_not_fit_are_named(heads):
    with pytest.raises(ValueError, match="MLSTM: heads 3 do not divide dim 64"):
        plait.ModelConfig(vocab=9, dim=64, pattern="X", layers={"X": plait.MLSTM(heads=heads)})
