"""The same weights in transformers' own classes give the same logits and the same greedy text.

They are the independent statement of what each family computes; only the order of rows in fused projections differs.
"""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import plait
from plait.model import LanguageModel

VOCAB, DIM, HIDDEN = 61, 64, 96
# transformers computes norms, rotations and recurrences in float32 whatever the model's dtype; eight of its Qwen3-Next
# layers are 4e-5 from a model that is float64 throughout (ours, in float32, 1.4e-5)
TOLERANCE = 1e-4

Weights = dict[str, torch.Tensor]


def qwen3_next(key_heads=2, value_heads=4):
    config = Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=18,
        linear_value_head_dim=22,
        mlp_only_layers=list(range(8)),
        num_experts=0,
        rms_norm_eps=1e-4,  # a first token's near-zero output, normed, would blow up rounding
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    )
    design = plait.ModelConfig(
        vocab=VOCAB,
        dim=DIM,
        pattern="((DF)3 AF)2",
        layers={
            "A": plait.Attention(
                heads=4, kv_heads=2, head_dim=32, qk_norm=True, output_gate=True, rope=plait.RoPE(fraction=0.25)
            ),
            "D": plait.GatedDeltaNet(heads=key_heads, head_dim=18, value_heads=value_heads, value_head_dim=22),
            "F": plait.SwiGLU(hidden=HIDDEN),
        },
        norm=plait.RMSNorm(zero_centered=True, eps=config.rms_norm_eps),
        tie_embeddings=False,
    )
    return Qwen3NextForCausalLM(config), design, qwen3_next_weights


def qwen3_next_weights(theirs: Weights, design: plait.ModelConfig) -> Weights:
    ours = outer(theirs, "model.embed_tokens", "model.norm")
    delta = design.place("D#0").layer
    share = delta.value_heads // delta.heads
    for layer in range(8):
        here = {name.split(".", 3)[3]: x for name, x in theirs.items() if name.startswith(f"model.layers.{layer}.")}
        mixer = f"slots.{2 * layer}.mixer."
        ours |= feed_forward(here, layer)
        if "self_attn.q_proj.weight" in here:
            # queries and gates alternate head by head
            query, gate = here["self_attn.q_proj.weight"].unflatten(0, (4, 2, 32)).unbind(1)
            rest = [here[f"self_attn.{name}_proj.weight"] for name in "kv"]
            ours[mixer + "qkv_proj.weight"] = torch.cat([query.flatten(0, 1), *rest, gate.flatten(0, 1)])
            ours[mixer + "o_proj.weight"] = here["self_attn.o_proj.weight"]
            for name in ("q_norm", "k_norm"):
                ours[f"{mixer}{name}.weight"] = here[f"self_attn.{name}.weight"]
            continue
        # q, k, v, z and b, a stand together key head by key head
        grouped = here["linear_attn.in_proj_qkvz.weight"].unflatten(0, (delta.heads, -1))
        qkvz = grouped.split([18, 18, share * 22, share * 22], 1)
        ba = here["linear_attn.in_proj_ba.weight"].unflatten(0, (delta.heads, 2 * share)).split(share, 1)
        ours[mixer + "in_proj.weight"] = torch.cat([x.flatten(0, 1) for x in (*qkvz, *ba)])
        ours[mixer + "conv1d.weight"] = here["linear_attn.conv1d.weight"].squeeze(1)
        for name in ("A_log", "dt_bias", "norm.weight", "out_proj.weight"):
            ours[mixer + name] = here[f"linear_attn.{name}"]
    return ours


def llama():
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    design = plait.ModelConfig(
        vocab=VOCAB,
        dim=DIM,
        pattern="(AF)3",
        layers={
            "A": plait.Attention(heads=4, kv_heads=2, rope=plait.RoPE(theta=500.0)),
            "F": plait.SwiGLU(hidden=HIDDEN),
        },
    )
    return LlamaForCausalLM(config), design, llama_weights


def llama_weights(theirs: Weights, design: plait.ModelConfig) -> Weights:
    ours = outer(theirs, "model.embed_tokens", "model.norm")
    del ours["lm_head.weight"]  # tied
    for layer in range(3):
        here = {name.split(".", 3)[3]: x for name, x in theirs.items() if name.startswith(f"model.layers.{layer}.")}
        mixer = f"slots.{2 * layer}.mixer."
        ours |= feed_forward(here, layer)
        ours[mixer + "qkv_proj.weight"] = torch.cat([here[f"self_attn.{name}_proj.weight"] for name in "qkv"])
        ours[mixer + "o_proj.weight"] = here["self_attn.o_proj.weight"]
    return ours


def mamba2(groups=1):
    config = Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=DIM,
        num_heads=8,
        head_dim=16,
        state_size=14,
        n_groups=groups,
        num_hidden_layers=3,
        chunk_size=32,
        layer_norm_epsilon=1e-5,
    )
    design = plait.ModelConfig(
        vocab=VOCAB,
        dim=DIM,
        pattern="M3",
        layers={"M": plait.Mamba2(heads=8, head_dim=16, state_dim=14, groups=groups)},
        norm=plait.RMSNorm(eps=1e-5),
        tie_embeddings=False,
    )
    return Mamba2ForCausalLM(config), design, mamba2_weights


def mamba2_weights(theirs: Weights, design: plait.ModelConfig) -> Weights:
    ours = outer(theirs, "backbone.embeddings", "backbone.norm_f")
    for layer in range(3):
        theirs_here, mixer = f"backbone.layers.{layer}.", f"slots.{layer}.mixer."
        ours[f"slots.{layer}.norm.weight"] = theirs[theirs_here + "norm.weight"]
        ours[mixer + "conv1d.weight"] = theirs[theirs_here + "mixer.conv1d.weight"].squeeze(1)
        ours[mixer + "conv1d.bias"] = theirs[theirs_here + "mixer.conv1d.bias"]
        for name in ("in_proj.weight", "out_proj.weight", "norm.weight", "A_log", "dt_bias", "D"):
            ours[mixer + name] = theirs[f"{theirs_here}mixer.{name}"]
    return ours


def outer(theirs: Weights, embed: str, norm: str) -> Weights:
    return {
        "embed.weight": theirs[f"{embed}.weight"],
        "norm.weight": theirs[f"{norm}.weight"],
        "lm_head.weight": theirs["lm_head.weight"],
    }


def feed_forward(here: Weights, layer: int) -> Weights:
    return {
        f"slots.{2 * layer}.norm.weight": here["input_layernorm.weight"],
        f"slots.{2 * layer + 1}.norm.weight": here["post_attention_layernorm.weight"],
        f"slots.{2 * layer + 1}.mixer.up_proj.weight": torch.cat(
            [here["mlp.gate_proj.weight"], here["mlp.up_proj.weight"]]
        ),
        f"slots.{2 * layer + 1}.mixer.down_proj.weight": here["mlp.down_proj.weight"],
    }


FAMILIES = {
    "llama": llama,
    "qwen3-next": qwen3_next,
    "qwen3-next with a key head per value head": lambda: qwen3_next(3, 3),
    "mamba2": mamba2,
    "mamba2 with groups": lambda: mamba2(4),
}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def twins(request) -> tuple[PreTrainedModel, LanguageModel]:
    torch.manual_seed(0)
    theirs, design, weights = request.param()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours = plait.build(design)
    ours.load_state_dict(weights(theirs.state_dict(), design))
    return theirs.eval(), ours


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 63, 64, 130])
def test_logits(twins, length, dtype):
    theirs, ours = (model.to(dtype) for model in twins)
    tokens = torch.randint(VOCAB, (2, length))
    want = theirs(tokens).logits
    error = (ours(tokens)[0] - want).abs().max() / want.abs().max()
    assert error < TOLERANCE


def test_gradients(twins):
    theirs, ours = twins
    tokens = torch.randint(VOCAB, (2, 70))
    weight = torch.randn(2, 70, VOCAB)
    (theirs(tokens).logits * weight).sum().backward()
    (ours(tokens)[0] * weight).sum().backward()
    got, want = ours.embed.weight.grad, theirs.get_input_embeddings().weight.grad
    assert (got - want).abs().max() / want.abs().max() < 10 * TOLERANCE  # through every layer and back


@torch.no_grad()
def test_greedy_text_with_state(twins):
    theirs, ours = twins
    prompt = torch.randint(VOCAB, (2, 37))
    want = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    text, (logits, state) = prompt, ours(prompt, ours.init_state(2))
    for _ in range(20):
        token = logits[:, -1:].argmax(-1)
        text = torch.cat([text, token], 1)
        logits, state = ours(token, state)
    assert torch.equal(text, want)
