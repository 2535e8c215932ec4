"""RG-LRU and Mamba-1 with the weights of transformers' own modules: outputs and gradients, whole and token by token."""

import pytest
import torch
from transformers import DynamicCache, FalconMambaConfig, JambaConfig, MambaConfig, RecurrentGemmaConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

import plait
from plait.layers import context_for

DIM, EPS = 48, 1e-5
T = 70
# theirs have float32 in the midst of whatever the dtype is (decays, states), so that is what all are compared in; a gradient is
# a sum over 140 tokens
TOLERANCE = 1e-5


def layer_of(letter, config):
    """The layer, and its state before any token."""
    norm = plait.RMSNorm(eps=EPS)
    model = plait.build(plait.ModelConfig(vocab=7, dim=DIM, pattern=letter, layers={letter: config}, norm=norm))
    return model.slots[0].mixer, model.init_state(2).slots[0]


@torch.no_grad()
def drawn(theirs):
    for parameter in theirs.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0)


def griffin():
    theirs = RecurrentGemmaRecurrentBlock(RecurrentGemmaConfig(hidden_size=DIM, lru_width=60, num_attention_heads=3), 0)
    drawn(theirs)
    ours, state = layer_of("R", plait.RGLRU(heads=3, head_dim=20))

    def weights(w):
        gates = [w[f"rg_lru.{name}_gate_weight"].mT for name in ("input", "recurrent")]  # theirs are inputs first
        biases = [w[f"rg_lru.{name}_gate_bias"].flatten() for name in ("input", "recurrent")]
        projections = {
            f"in_proj.{leaf}": torch.cat([w[f"linear_x.{leaf}"], w[f"linear_y.{leaf}"]]) for leaf in ("weight", "bias")
        }
        return projections | {
            "conv1d.weight": w["conv_1d.weight"].squeeze(1),
            "conv1d.bias": w["conv_1d.bias"],
            "gates.weight": torch.cat(gates, 1),
            "gates.bias": torch.cat(biases),
            "Lambda": w["rg_lru.recurrent_param"].view(3, 20),
            "out_proj.weight": w["linear_out.weight"],
            "out_proj.bias": w["linear_out.bias"],
        }

    def run(x, first, cache):
        positions = torch.arange(first, first + x.shape[1]).expand(2, -1)
        return theirs(x, positions, None, use_cache=cache is not None)[0]

    return theirs, ours, state, weights, run


def mamba(theirs, **ours):
    drawn(theirs)
    layer, state = layer_of("Ma", plait.Mamba(state_dim=6, dt_rank=5, **ours))

    def weights(w):
        same = ("in_proj.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "A_log", "D", "out_proj.weight")
        found = {name: w[name] for name in same}
        found |= {"conv1d.weight": w["conv1d.weight"].squeeze(1), "dt_bias": w["dt_proj.bias"]}
        norms = {"dt_norm.weight": "dt", "B_norm.weight": "b", "C_norm.weight": "c"}
        return found | {
            ours: w[f"{name}_layernorm.weight"] for ours, name in norms.items() if f"{name}_layernorm.weight" in w
        }

    def run(x, first, cache):
        return theirs(x, cache_params=cache) if cache is not None else theirs(x)

    return theirs, layer, state, weights, run


SIZES = {"vocab_size": 7, "hidden_size": DIM, "num_hidden_layers": 1}
MAMBA = MambaConfig(**SIZES, state_size=6, time_step_rank=5)
FALCON = FalconMambaConfig(**SIZES, state_size=6, time_step_rank=5, mixer_rms_eps=EPS)
JAMBA = JambaConfig(
    **SIZES, mamba_d_state=6, mamba_dt_rank=5, rms_norm_eps=EPS, attn_layer_offset=1, attn_layer_period=2
)
TWINS = {
    "RecurrentGemma": (griffin, None),
    "Mamba": (lambda: mamba(MambaMixer(MAMBA, 0)), MAMBA),
    "Falcon-Mamba": (lambda: mamba(FalconMambaMixer(FALCON, 0, initialize_mixer_weights=False), norms=True), FALCON),
    "Jamba": (lambda: mamba(JambaMambaMixer(JAMBA, 0), norms=True), JAMBA),
}


@pytest.fixture(params=TWINS.values(), ids=TWINS)
def twins(request):
    torch.manual_seed(0)
    make, config = request.param
    theirs, ours, state, weights, run = make()
    missing, unexpected = ours.load_state_dict(weights(theirs.state_dict()), strict=False)
    assert not unexpected
    assert all("_norm." in name for name in missing)  # Falcon-Mamba has no weights there, and ours start at 1
    theirs.eval()
    return theirs, ours, state, weights, run, config


def close(got, want):
    assert got.shape == want.shape
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()


def test_outputs_and_gradients(twins):
    theirs, ours, _, weights, run, _ = twins
    x, weight = torch.randn(2, T, DIM), torch.randn(2, T, DIM)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, _ = ours(mine, context_for(mine), None)
    want = run(other, 0, None)
    close(y, want)
    (y * weight).sum().backward()
    (want * weight).sum().backward()
    close(mine.grad, other.grad)
    expected = weights({name: p.grad for name, p in theirs.named_parameters()})
    got = {name: p.grad for name, p in ours.named_parameters()}
    for name, gradient in expected.items():
        close(got[name], gradient)


@torch.no_grad()
def test_token_by_token(twins):
    _, ours, state, _, run, config = twins
    x = torch.randn(2, 12, DIM)
    cache = True if config is None else DynamicCache(config=config)
    seen = 0
    for piece in x.split([7, 1, 1, 1, 1, 1], 1):
        context = context_for(piece, torch.full((2,), seen), (seen, seen))
        y, state = ours(piece, context, state)
        close(y, run(piece, seen, cache))
        seen += piece.shape[1]
