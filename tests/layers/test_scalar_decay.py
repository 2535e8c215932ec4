"""RetNet, lightning attention and simple GLA against what their papers and transformers say."""

import torch
import torch.nn.functional as F
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

import plait
from plait.layers import context_for
from plait.state import Recurrent

DIM, HEADS, T = 64, 4, 150
TOLERANCE = 1e-5  # MiniMax's norm and decays are float32


def built(layer, **changes):
    design = plait.ModelConfig(vocab=9, dim=DIM, pattern="L", layers={"L": layer}, norm=plait.RMSNorm(eps=1e-6))
    return plait.build(design, dtype=torch.float64).slots[0].mixer


def close(got, want, tolerance=1e-10):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def test_lightning_attention_is_minimax_s():
    """Outputs, states, gradients; layer 1 of 3."""
    torch.manual_seed(0)
    config = MiniMaxConfig(hidden_size=DIM, num_attention_heads=HEADS, head_dim=16, num_hidden_layers=3, block_size=32)
    theirs = MiniMaxLightningAttention(config, 1).double()
    slope = float(theirs.slope_rate.flatten()[0] / 2 ** (-8 / HEADS))
    assert abs(slope - 0.5) < 1e-4
    for name, buffer in zip(("query", "key", "diagonal"), theirs.decay_factors(theirs.slope_rate), strict=True):
        setattr(theirs, f"{name}_decay", buffer)  # in float64
    ours = built(plait.LightningAttention(heads=HEADS, slope=slope))
    qkv = theirs.qkv_proj.weight.data.normal_(std=0.3).view(HEADS, 3, 16, DIM)
    gate, out = (m.weight.data.normal_(std=0.3) for m in (theirs.output_gate, theirs.out_proj))
    norm = theirs.norm.weight.data.normal_()
    ours.in_proj.weight.data.copy_(torch.cat([*qkv.transpose(0, 1).flatten(1, 2), gate]))
    ours.norm.weight.data.copy_(norm)
    ours.out_proj.weight.data.copy_(out)
    x = torch.randn(2, T, DIM, dtype=torch.float64, requires_grad=True)
    start = Recurrent(torch.zeros(2, HEADS, 16, 16).double(), torch.zeros(2, 0, DIM))
    want, state = theirs(x, None, None)
    got, kept = ours(x, context_for(x), start)
    close(got, want, TOLERANCE)
    close(kept.s, state.mT, TOLERANCE)
    direction = torch.randn_like(want)
    trained = theirs.qkv_proj.weight, theirs.output_gate.weight, theirs.norm.weight, theirs.out_proj.weight
    dx, dqkv, dgate, *rest = torch.autograd.grad((want * direction).sum(), (x, *trained))
    din = torch.cat([*dqkv.view(qkv.shape).transpose(0, 1).flatten(1, 2), dgate])
    mine = torch.autograd.grad((got * direction).sum(), (x, *ours.parameters()))
    named = dict(zip(("x", *(name for name, _ in ours.named_parameters())), mine, strict=True))
    wanted = {"x": dx, "in_proj.weight": din, "norm.weight": rest[0], "out_proj.weight": rest[1]}
    assert named.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(named[name], gradient, TOLERANCE)


def whole(q, k, v, decays):
    """The parallel form: (Q K^T * D) V with D_ij the decay from j to i; (b, t, h, k | v), decays (b, t, h)."""
    G = decays.log().cumsum(1).transpose(1, 2)  # (b, h, t)
    D = (G[..., :, None] - G[..., None, :]).exp().tril()
    return torch.einsum("bthk,bshk,bhts,bshv->bthv", q, k, D, v)


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_retention_is_the_paper_s():
    """arXiv 2307.08621, equations 5, 7 and 8; rotation as complex numbers."""
    ours = built(plait.RetNet(heads=HEADS))
    x = torch.randn(2, T, DIM, dtype=torch.float64)
    q, k, v, gate = (y.unflatten(-1, (HEADS, -1)) for y in ours.in_proj(x).split([DIM, DIM, 2 * DIM, 2 * DIM], -1))

    def rotated(y):
        angle = torch.arange(T)[:, None].double() * 10_000.0 ** (-torch.arange(8).double() / 8)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        z = torch.complex(*y.chunk(2, -1)) * turn
        return torch.cat([z.real, z.imag], -1)

    gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS).double())
    o = whole(rotated(q) * 16**-0.5, rotated(k), v, gamma.expand(2, T, HEADS))
    close(ours(x, context_for(x), None)[0], ours.out_proj((rms(o) * F.silu(gate)).flatten(2)))


def test_simple_gla_has_a_decay_of_the_token():
    ours = built(plait.SimpleGLA(heads=HEADS, value_head_dim=10))
    ours.g_bias.data.normal_()
    x = torch.randn(2, T, DIM, dtype=torch.float64)
    *parts, g = ours.in_proj(x).split([DIM, DIM, 40, 40, HEADS], -1)
    q, k, v, gate = (y.unflatten(-1, (HEADS, -1)) for y in parts)
    o = whole(q * 16**-0.5, k, v, (g + ours.g_bias).sigmoid() ** (1 / 16))
    close(ours(x, context_for(x), None)[0], ours.out_proj((rms(o) * F.silu(gate)).flatten(2)))
