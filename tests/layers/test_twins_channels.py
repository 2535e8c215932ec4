"""Delta rules with a decay per key channel, and with negative eigenvalues: the same weights in transformers' own modules give
the same outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.olmo_hybrid.configuration_olmo_hybrid import OlmoHybridConfig
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

import plait
from plait.layers.context import context_for

DIM, HEADS, K, EPS = 64, 3, 10, 1e-5
# theirs compute the rule in float32 whatever the module's dtype; measured 2e-6, gradients 5e-6
TOLERANCE = 5e-5


def kimi():
    config = KimiLinearConfig(
        hidden_size=DIM,
        num_hidden_layers=1,
        linear_num_heads=HEADS,
        linear_head_dim=K,
        rms_norm_eps=EPS,
        layer_types=["linear_attention"],
    )
    return KimiLinearDeltaAttention(config, 0), plait.KimiDeltaAttention(heads=HEADS, head_dim=K), kimi_weights


def kimi_weights(theirs):
    rows = ["q_proj", "k_proj", "v_proj", "forget_gate.f_a_proj", "g_a_proj", "b_proj"]
    return {
        "in_proj.weight": torch.cat([theirs[f"{name}.weight"] for name in rows]),
        "conv1d.weight": theirs["conv1d.weight"].squeeze(1),
        "decay_proj.weight": theirs["forget_gate.f_b_proj.weight"],
        "gate_proj.weight": theirs["g_b_proj.weight"],
        "A_log": theirs["forget_gate.A_log"].flatten(),
        "dt_bias": theirs["forget_gate.dt_bias"],
        "norm.weight": theirs["o_norm.weight"],
        "out_proj.weight": theirs["o_proj.weight"],
    }


def olmo():
    config = OlmoHybridConfig(
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=K,
        linear_value_head_dim=14,
        layer_types=["linear_attention", "full_attention"],
    )
    layer = plait.GatedDeltaNet(heads=HEADS, head_dim=K, value_head_dim=14, negative_eigenvalues=True)
    return OlmoHybridGatedDeltaNet(config, 0), layer, olmo_weights


def olmo_weights(theirs):
    rows = ["q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj"]
    return {
        "in_proj.weight": torch.cat([theirs[f"{name}.weight"] for name in rows]),
        "conv1d.weight": theirs["conv1d.weight"].squeeze(1),
        "A_log": theirs["A_log"],
        "dt_bias": theirs["dt_bias"],
        "norm.weight": theirs["o_norm.weight"],
        "out_proj.weight": theirs["o_proj.weight"],
    }


def module(layer):
    """Of a model whose norms have EPS, in float64."""
    design = plait.ModelConfig(vocab=7, dim=DIM, pattern="X", layers={"X": layer}, norm=plait.RMSNorm(eps=EPS))
    return plait.build(design, dtype=torch.float64).place("X#0")


def near(got, want):
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()


@pytest.mark.parametrize("length", [3, 64, 150])
@pytest.mark.parametrize("twin", [kimi, olmo])
def test_transformers_module(twin, length):
    torch.manual_seed(length)
    theirs, layer, weights = twin()
    theirs = theirs.double()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif name.endswith("A_log"):
                parameter.copy_(torch.randn(parameter.shape))
            else:
                parameter.normal_(1.0, 0.3)
    ours = module(layer)
    ours.load_state_dict(weights(theirs.state_dict()))
    x = torch.randn(2, length, DIM, dtype=torch.float64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = ours(mine, context_for(mine), None)[0], theirs(other)
    near(got, want)
    up = torch.randn_like(want)
    (got * up).sum().backward()
    (want * up).sum().backward()
    near(mine.grad, other.grad)
    gradients = weights({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        near(parameter.grad, gradients[name])


@torch.no_grad()
@pytest.mark.parametrize("negative", [False, True])
def test_deltanet_is_transformers_rule_without_decay(negative):
    torch.manual_seed(0)
    ours = module(plait.DeltaNet(heads=HEADS, head_dim=K, value_head_dim=14, negative_eigenvalues=negative)).double()
    x = torch.randn(2, 90, DIM, dtype=torch.float64)
    got, _ = ours(x, context_for(x), None)
    qkv, b = ours.in_proj(x).split([2 * HEADS * K + HEADS * 14, HEADS], -1)
    filtered = F.conv1d(F.pad(qkv.mT, (3, 0)), ours.conv1d.weight[:, None], groups=qkv.shape[-1])
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in F.silu(filtered).mT.split([HEADS * K, HEADS * K, HEADS * 14], -1))
    beta = torch.sigmoid(b) * (1 + negative)
    o, _ = torch_recurrent_gated_delta_rule(
        q, k, v, torch.zeros_like(beta), beta, None, False, use_qk_l2norm_in_kernel=True
    )
    near(got, ours.out_proj(F.rms_norm(o, (14,), ours.norm.weight, EPS).flatten(2)))
