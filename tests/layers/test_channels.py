"""GLA, HGRN-2 and RWKV-7 by their papers' equations, a token at a time in float64; transformers has none of them."""

import pytest
import torch
import torch.nn.functional as F

import plait
from plait.layers.context import context_for
from tests.ops.conftest import Close, run_with_gradients

DIM, T, EPS = 64, 70, 1e-4
close = Close()


def module(layer, pattern="X", at=None, address="X#0"):
    """Of a float64 model whose every parameter matters."""
    norm = plait.RMSNorm(eps=EPS)
    design = plait.ModelConfig(vocab=7, dim=DIM, pattern=pattern, layers={"X": layer}, norm=norm, at=at or {})
    found = plait.build(design, dtype=torch.float64).place(address)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return found


def recurrence(S, decay, k, v, q, removed=None, written=None):
    """Outputs (b, t, h, v) of S <- S diag(decay) - (S removed) written^T + v k^T."""
    outputs = []
    for i in range(q.shape[1]):
        old = S
        S = S * decay[:, i, :, None] + v[:, i, :, :, None] * k[:, i, :, None]
        if removed is not None:
            S = S - (old * removed[:, i, :, None]).sum(-1, keepdim=True) * written[:, i, :, None]
        outputs.append((S * q[:, i, :, None]).sum(-1))
    return torch.stack(outputs, 1)


def gla(layer, x):
    c = layer.config
    *qkvz, low = layer.in_proj(x).split(list(c.rows().values()), -1)
    q, k, v, z = (y.unflatten(-1, (c.heads, -1)) for y in qkvz)
    decay = torch.sigmoid(layer.decay_proj(low)) ** (1 / c.temper)
    o = recurrence(start(c.heads, v, k), decay.unflatten(-1, (c.heads, -1)), k, v, q * c.head_dim**-0.5)
    return layer.out_proj((F.rms_norm(o, o.shape[-1:], layer.norm.weight, EPS) * F.silu(z)).flatten(2))


def hgrn2(layer, x):
    c = layer.config
    q, f, i = layer.in_proj(x).split(list(c.rows().values()), -1)
    low = torch.sigmoid(layer.bound) if layer.bound is not None else c.lower_bound
    f = low + (1 - low) * torch.sigmoid(f)
    q, f, i = (y.unflatten(-1, (c.heads, -1)) for y in (F.silu(q), f, i))
    o = recurrence(start(c.heads, i, f), f, 1 - f, i, q).flatten(2)
    return layer.out_proj(F.rms_norm(o, o.shape[-1:], layer.norm.weight, c.norm_eps or EPS))


def rwkv7(layer, x, first=None):
    """Equations 3 to 22."""
    heads, before = layer.config.heads, F.pad(x, (0, 0, 1, 0))[:, :-1]
    r, w, k, v, a, g = (torch.lerp(x, before, getattr(layer, f"x_{name}")) for name in "rwkvag")
    w = layer.w0 + torch.tanh(w @ layer.w_down.weight.T) @ layer.w_up.weight.T
    w = torch.exp(-torch.exp(torch.tensor(-0.5, dtype=x.dtype)) * torch.sigmoid(w))
    values = layer.v_proj(v)
    if layer.config.value_residual:
        first = values if first is None else first
        values = torch.lerp(values, first, torch.sigmoid(layer.v0 + v @ layer.v_down.weight.T @ layer.v_up.weight.T))
    a = torch.sigmoid(layer.a0 + a @ layer.a_down.weight.T @ layer.a_up.weight.T)
    gate = torch.sigmoid(g @ layer.g_down.weight.T) @ layer.g_up.weight.T
    r, k = layer.r_proj(r), layer.k_proj(k)
    r, w, v, a, kk, k = (
        y.unflatten(-1, (heads, -1)) for y in (r, w, values, a, k * layer.k_k, k * (1 + (a - 1) * layer.k_a))
    )
    kk = kk / kk.norm(dim=-1, keepdim=True)
    o = recurrence(start(heads, v, k), w, k, v, r, kk, kk * a)
    o = F.group_norm(o.flatten(0, 1).flatten(1), heads, layer.norm.weight, layer.norm.bias, 64e-5)
    o = o.view(v.shape) + (r * k * layer.r_k.view(heads, -1)).sum(-1, keepdim=True) * v
    return layer.out_proj(o.flatten(2) * gate)


def start(heads, v, k):
    return v.new_zeros(len(v), heads, v.shape[-1], k.shape[-1])


LAYERS = {
    "gla": (gla, plait.GLA(heads=2, head_dim=6, value_head_dim=10)),
    "hgrn2": (hgrn2, plait.HGRN2(heads=2, state_dim=6, head_dim=9)),
    "hgrn2, bound given": (hgrn2, plait.HGRN2(heads=2, state_dim=6, lower_bound=0.2)),
    "hgrn2, norm": (hgrn2, plait.HGRN2(heads=2, state_dim=6, norm_eps=0.1)),
    "hgrn2, no bound": (hgrn2, plait.HGRN2(heads=2, state_dim=6, lower_bound=0.0)),
    "rwkv7": (rwkv7, plait.RWKV7(heads=2, head_dim=10, value_residual=False)),
    "rwkv7, mixed with its own values": (rwkv7, plait.RWKV7(heads=2, head_dim=10)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_as_in_the_paper(name):
    equations, layer = LAYERS[name]
    layer = module(layer)
    tensors = {"x": torch.randn(2, T, DIM, dtype=torch.float64)} | dict(layer.named_parameters())

    def run(form):
        def call(x, **weights):
            inside = {f"layer.{name}": weight for name, weight in weights.items()}
            return torch.func.functional_call(_Calls(layer, form), inside, (x,)), None

        return run_with_gradients(call, tensors)

    want = run(equations)
    got = run(lambda layer, x: layer(x, context_for(x), None)[0])
    for key, x in want.items():
        close(got[key], x)


class _Calls(torch.nn.Module):
    """A layer called in some other way than by its forward."""

    def __init__(self, layer, form):
        super().__init__()
        self.layer, self.form = layer, form

    def forward(self, x):
        return self.form(self.layer, x)


@torch.no_grad()
def test_rwkv7_mixes_the_first_layers_values():
    layer = module(plait.RWKV7(heads=2, head_dim=10))
    x, first = torch.randn(2, T, DIM, dtype=torch.float64), torch.randn(2, T, 20, dtype=torch.float64)
    context = context_for(x)
    context.cached("rwkv7 v0", lambda: first)
    close(layer(x, context, None)[0], rwkv7(layer, x, first))


@torch.no_grad()
def test_rwkv7s_channel_mixing():
    layer = module(plait.RWKV7FeedForward(hidden=40))
    x = torch.randn(2, T, DIM, dtype=torch.float64)
    mixed = torch.lerp(x, F.pad(x, (0, 0, 1, 0))[:, :-1], layer.x_k)
    close(layer(x, context_for(x), None)[0], torch.relu(mixed @ layer.up_proj.weight.T) ** 2 @ layer.down_proj.weight.T)


def test_values_of_unlike_heads_are_not_mixed():
    with pytest.raises(
        ValueError, match=r"Rw#1: value residual mixes its values of \(heads, head_dim\) = \(2, 10\) with"
    ):
        plait.ModelConfig(
            vocab=7, dim=DIM, pattern="Rw2", layers={"Rw": plait.RWKV7(heads=2)}, at={"Rw#1": {"head_dim": 10}}
        )


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: plait.HGRN2(lower_bound=1.0), r"HGRN2.lower_bound must be at least 0 and below 1, got 1.0"),
        (lambda: plait.GLA(temper=0), "temper"),
        (
            lambda: plait.GLA(heads=3).resolve(64),
            "GLA: 32 channels do not divide into 3 equal parts, so head_dim must be given",
        ),
        (lambda: plait.KimiDeltaAttention().resolve(100), "KimiDeltaAttention: dim 100 is not a multiple of 64"),
    ],
)
def test_wrong_configs_say_what_would_be_right(layer, message):
    with pytest.raises(ValueError, match=message):
        layer()
