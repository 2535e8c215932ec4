"""What stands between products has gradients of its own: they are those of the plain form, alone and in a compiled graph."""

import pytest
import torch
import torch.nn.functional as F

from plait.ops.rms_norm import l2norm, rms_norm
from plait.ops.rotary import rotate
from plait.ops.swiglu import geglu, swiglu
from tests.ops.conftest import run_with_gradients

ANGLES = torch.linspace(-4, 4, 14, dtype=torch.float64).view(1, 7, 1, 1, 2)
COS, SIN = ANGLES.cos(), torch.cat([-ANGLES.sin(), ANGLES.sin()], -2)


def plain_rotate(x):
    """Pairs as complex numbers."""
    pairs = torch.complex(x[..., :2], x[..., 2:4]) * torch.polar(torch.ones_like(ANGLES), ANGLES)[:, :, 0]
    return torch.cat([pairs.real, pairs.imag, x[..., 4:]], -1)


def plain_gated(act):
    return lambda x: act(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]


OURS = {
    "swiglu": (swiglu, plain_gated(F.silu)),
    "geglu": (geglu, plain_gated(lambda gate: F.gelu(gate, approximate="tanh"))),
    "rotate": (lambda x: rotate(x, COS, SIN), plain_rotate),
    "l2norm": (l2norm, lambda x: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()),
    "rms_norm": (
        lambda x: rms_norm(x, x.new_full((x.shape[-1],), 2.0), 1e-6),
        lambda x: 2 * F.rms_norm(x, x.shape[-1:], eps=1e-6),
    ),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own doing
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("name", OURS)
def test_plain_form(name, width, close):
    """Of parts of a projection, as layers have it."""
    torch.manual_seed(0)
    ours, plain = OURS[name]
    x = {"x": torch.randn(2, 7, 5, width, dtype=torch.float64)}
    want = run_with_gradients(lambda x: (plain(x[:, :, 1:4]), None), x)
    for run in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        for key, got in run_with_gradients(lambda x, run=run: (run(x[:, :, 1:4]), None), x).items():
            close(got, want[key])
    with torch.no_grad():
        close(ours(x["x"][:, :, 1:4]), want["0"])


@pytest.mark.parametrize("name", OURS)
def test_gradcheck(name):
    assert torch.autograd.gradcheck(OURS[name][0], torch.randn(1, 7, 1, 6, dtype=torch.float64, requires_grad=True))
