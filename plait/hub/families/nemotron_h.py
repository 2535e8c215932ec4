"""Nemotron-H and Nemotron 3: one mixer a layer, which is Mamba-2, attention without positions, relu^2 or experts of it."""

from random import Random
from typing import Any

from plait.design.layers import Attention, Layer, Mamba2, MixtureOfExperts, ReLU2
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.hub.families.family import Family, all_of, by_kind, pattern
from plait.hub.families.fields import Fields
from plait.hub.families.llama import ATTENTION, FULL, attention
from plait.hub.families.mamba import ENDS, SILU, mamba2_rules
from plait.hub.families.tiny import mamba2_sizes, transformer

LETTER = {"linear_attention": "M", FULL: "A", "mlp": "F", "moe": "E"}
KIND = {Mamba2: "linear_attention", Attention: FULL, ReLU2: "mlp", MixtureOfExperts: "moe"}
RULES = {
    Mamba2: mamba2_rules("norm", "mixer"),
    Attention: ATTENTION | {"norm": "norm", "mixer.qkv_proj": "mixer.{part}_proj", "mixer.o_proj": "mixer.o_proj"},
    ReLU2: {"norm": "norm", "mixer.up_proj": "mixer.up_proj", "mixer.down_proj": "mixer.down_proj"},
    MixtureOfExperts: {
        "norm": "norm",
        "mixer.router": "mixer.gate.weight",
        "mixer.router_bias": "mixer.gate.e_score_correction_bias",
        "mixer.experts_up": "mixer.experts.{expert}.up_proj.weight",
        "mixer.experts_down": "mixer.experts.{expert}.down_proj.weight",
        "mixer.latent_in_proj": "mixer.fc1_latent_proj",
        "mixer.latent_out_proj": "mixer.fc2_latent_proj",
        "mixer.shared_up_proj": "mixer.shared_experts.up_proj",
        "mixer.shared_down_proj": "mixer.shared_experts.down_proj",
    },
}
# where theirs and ours say the same under two names
MAMBA2 = {
    "heads": "mamba_num_heads",
    "head_dim": "mamba_head_dim",
    "state_dim": "ssm_state_size",
    "groups": "n_groups",
    "conv_width": "conv_kernel",
    "conv_bias": "use_conv_bias",
    "in_bias": "use_bias",
    "out_bias": "use_bias",
    "dt_min": "time_step_min",  # which their whole runs hold the steps above; nothing comes of `time_step_limit`
}
EXPERTS = {
    "experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "hidden": "moe_intermediate_size",
    "renormalize": "norm_topk_prob",
    "scale": "routed_scaling_factor",
    "groups": "n_group",
    "top_groups": "topk_group",
    "shared_hidden": "moe_shared_expert_intermediate_size",
    "latent_dim": "moe_latent_size",
}


def _design(f: Fields) -> ModelConfig:
    f.must(mamba_hidden_act=SILU, mlp_hidden_act="relu2", attention_bias=False, tie_word_embeddings=False)
    f.must(num_nextn_predict_layers=0)
    f.carried("num_logits_to_keep", "use_mamba_kernels", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap")
    f.carried("residual_in_fp32", "rescale_prenorm_residual", "time_step_max", "time_step_floor", "time_step_limit")
    f.carried("chunk_size", "expand", "mamba_proj_bias", "output_router_logits", "sliding_window", "n_shared_experts")
    f.carried("mtp_layers_block_type", "intermediate_size", "mlp_bias", *EXPERTS.values())
    kinds = f["layers_block_type"]
    bound: dict[str, Layer] = {
        "M": Mamba2(**{ours: f[theirs] for ours, theirs in MAMBA2.items()}),
        "A": attention(f, rope=None),
        "F": ReLU2(hidden=f["intermediate_size"], bias=f["mlp_bias"]),
    }
    if "moe" in kinds:
        f.must(mlp_bias=False)
        own = {ours: f[theirs] for ours, theirs in EXPERTS.items()}
        bound["E"] = MixtureOfExperts(router="sigmoid", activation="relu2", bias_rate=0.0, **own)
    letters = [LETTER[kind] for kind in kinds]
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=f["hidden_size"],
        pattern=pattern(letters),
        layers={letter: layer for letter, layer in bound.items() if letter in letters},
        norm=RMSNorm(eps=f["layer_norm_epsilon"]),
        tie_embeddings=False,
    )


def _config(design: ModelConfig) -> dict[str, Any]:
    given: dict[str, Any] = {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "layers_block_type": [KIND[type(slot.layer)] for slot in design.slots],  # type: ignore[union-attr]  # no parallel slot passes `holds`
        "layer_norm_epsilon": design.norm.eps,
        "tie_word_embeddings": design.tied,
    }
    for m in all_of(design, Mamba2)[:1]:
        given |= {theirs: getattr(m, ours) for ours, theirs in MAMBA2.items()}
    for a in all_of(design, Attention)[:1]:
        given |= {"num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "head_dim": a.head_dim}
    for f in all_of(design, ReLU2)[:1]:
        given |= {"intermediate_size": f.hidden, "mlp_bias": f.bias}
    for e in all_of(design, MixtureOfExperts)[:1]:
        given |= {theirs: getattr(e, ours) for ours, theirs in EXPERTS.items()}
    return given


def _tiny(draw: Random) -> dict[str, Any]:
    config = transformer(draw)
    heads, groups, head_dim = mamba2_sizes(draw)
    kinds = [draw.choice([*LETTER]) for _ in range(draw.choice([3, 4]))]
    n_group = draw.choice([1, 1, 3])
    return {name: x for name, x in config.items() if name not in ("num_hidden_layers", "rms_norm_eps")} | {
        "layers_block_type": kinds,
        "layer_norm_epsilon": config["rms_norm_eps"],
        "tie_word_embeddings": False,
        "head_dim": draw.choice([8, 12]),
        "mamba_num_heads": heads,
        "mamba_head_dim": head_dim,
        "n_groups": groups,
        "ssm_state_size": draw.choice([5, 8]),
        "conv_kernel": draw.choice([2, 4]),
        "chunk_size": draw.choice([16, 256]),
        "use_conv_bias": draw.random() < 0.5,
        "use_bias": draw.random() < 0.5,
        "mlp_bias": "moe" not in kinds and draw.random() < 0.5,
        "time_step_min": draw.choice([0.001, 0.5]),
        "n_routed_experts": 6,
        "num_experts_per_tok": draw.choice([1, 2]),
        "moe_intermediate_size": draw.choice([16, 20]),
        "moe_shared_expert_intermediate_size": draw.choice([24, 12]),
        "moe_latent_size": draw.choice([None, 16]),
        "norm_topk_prob": draw.random() < 0.7,
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
        "n_group": n_group,
        "topk_group": draw.choice([1, 2]) if n_group > 1 else 1,
    }


FAMILIES = (
    Family(
        model_type="nemotron_h",
        architecture="NemotronHForCausalLM",
        design=_design,
        config=_config,
        slots=by_kind(RULES, per=1, inside="backbone.layers.{}."),
        tiny=_tiny,
        holds=(Mamba2, Attention, ReLU2, MixtureOfExperts),
        ends=ENDS,
    ),
)
