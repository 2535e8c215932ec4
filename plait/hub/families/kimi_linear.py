"""Kimi Linear: Kimi delta attention, latent attention without positions, experts behind a few dense layers."""

from collections.abc import Iterator
from random import Random
from typing import Any

from plait.design.layers import KimiDeltaAttention, LatentAttention, Layer, MixtureOfExperts, SwiGLU
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.design.places import layers
from plait.hub.families.deepseek import LATENT_EPS
from plait.hub.families.family import Family, Named, first, pattern
from plait.hub.families.fields import Fields
from plait.hub.families.llama import FULL
from plait.hub.families.qwen_hybrid import LINEAR
from plait.hub.weight_table import Either, Form, Rows, Rules

DECAYS = Form(lambda x: x.flatten(), lambda x: x.view(1, 1, -1, 1))
MIXER = {"norm": "input_layernorm"}
KDA: Rules = {
    **MIXER,
    "mixer.in_proj": (
        *(Rows(f"self_attn.{part}_proj", (part,)) for part in "qkvb"),
        Rows("self_attn.f_a_proj", ("decay",)),
        Rows("self_attn.g_a_proj", ("z",)),
    ),
    "mixer.conv1d": "self_attn.{part}_conv1d",
    "mixer.decay_proj": "self_attn.f_b_proj",
    "mixer.gate_proj": "self_attn.g_b_proj",
    "mixer.A_log": Rows("self_attn.A_log", form=DECAYS),
    "mixer.dt_bias": "self_attn.dt_bias",
    "mixer.norm": "self_attn.o_norm",
    "mixer.out_proj": "self_attn.o_proj",
}
MOE: Rules = {
    "norm": "post_attention_layernorm",
    "mixer.router": "block_sparse_moe.gate.weight",
    "mixer.router_bias": "block_sparse_moe.gate.e_score_correction_bias",
    "mixer.experts_up": (
        Rows("block_sparse_moe.experts.{expert}.w1.weight", ("gate",)),
        Rows("block_sparse_moe.experts.{expert}.w3.weight", ("up",)),
    ),
    "mixer.experts_down": "block_sparse_moe.experts.{expert}.w2.weight",
    "mixer.shared_up_proj": "block_sparse_moe.shared_experts.{part}_proj",
    "mixer.shared_down_proj": "block_sparse_moe.shared_experts.down_proj",
}
# dense layers have the first names in the published files, the second ones where transformers has written them
DENSE: Rules = {
    "norm": "post_attention_layernorm",
    "mixer.up_proj": Either(("mlp.{part}_proj", "block_sparse_moe.{part}_proj")),
    "mixer.down_proj": Either(("mlp.down_proj", "block_sparse_moe.down_proj")),
}
FIXED = {
    "mla_use_nope": True,
    "moe_layer_freq": 1,
    "moe_router_activation_func": "sigmoid",
    "use_grouped_topk": True,
    "num_nextn_predict_layers": 0,
}


def latent(layer: LatentAttention) -> Rules:
    """Keys and values of a head are read off the latent beside each other."""
    compressed = Rows("self_attn.kv_a_proj_with_mqa", ("kv", "k_rope"))
    queries = Rows("self_attn.q_a_proj" if layer.query_rank else "self_attn.q_proj", ("q",))
    return {
        **MIXER,
        "mixer.in_proj": (queries, compressed),
        "mixer.q_norm": "self_attn.q_a_layernorm",
        "mixer.q_proj": "self_attn.q_b_proj",
        "mixer.kv_norm": "self_attn.kv_a_layernorm",
        "mixer.k_up + mixer.v_up": Rows("self_attn.kv_b_proj.weight", groups=layer.heads),
        "mixer.o_proj": "self_attn.o_proj",
    }


def _rules(layer: Layer) -> Rules:
    if isinstance(layer, LatentAttention):
        return latent(layer)
    if isinstance(layer, KimiDeltaAttention):
        return KDA
    return MOE if isinstance(layer, MixtureOfExperts) else DENSE


def _slots(design: ModelConfig) -> Iterator[Named]:
    for i, place in enumerate(layers(design.slots)):
        yield Named(f"slots.{i}.", f"model.layers.{i // 2}.", _rules(place.layer))


def _design(f: Fields) -> ModelConfig:
    f.must(hidden_act="silu", attention_bias=False, **FIXED)
    f.must(num_key_value_heads=f["num_attention_heads"])
    # what layers are and how large has been taken from these; nothing turns
    f.carried("linear_attn_config", "first_k_dense_replace", "num_hidden_layers", "head_dim", "qk_head_dim")
    f.carried("rope_theta", "rope_scaling", "rope_parameters", "model_max_length", "output_router_logits")
    bound = {"K": _delta(f), "L": _latent(f), "E": _experts(f), "F": SwiGLU(hidden=f["intermediate_size"])}
    mixers = [_one(f, "layer_types", kind, {LINEAR: "K", FULL: "L"}) for kind in f["layer_types"]]
    channels = [_one(f, "mlp_layer_types", kind, {"dense": "F", "sparse": "E"}) for kind in f["mlp_layer_types"]]
    letters = [letter for pair in zip(mixers, channels, strict=True) for letter in pair]
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=f["hidden_size"],
        pattern=pattern(letters),
        layers={letter: layer for letter, layer in bound.items() if letter in letters},
        norm=RMSNorm(eps=f["rms_norm_eps"]),
        tie_embeddings=f["tie_word_embeddings"],
    )


def _one(f: Fields, name: str, value: Any, choices: dict[Any, str]) -> str:
    return Fields({name: value}, f.where).one_of(name, choices)


def _delta(f: Fields) -> KimiDeltaAttention:
    return KimiDeltaAttention(
        heads=f["linear_num_heads"], head_dim=f["linear_head_dim"], conv_width=f["linear_conv_kernel_dim"]
    )


def _latent(f: Fields) -> LatentAttention:
    return LatentAttention(
        heads=f["num_attention_heads"],
        nope_dim=f["qk_nope_head_dim"],
        rope_dim=f["qk_rope_head_dim"],
        value_dim=f["v_head_dim"],
        rank=f["kv_lora_rank"],
        query_rank=f["q_lora_rank"],
        rope=None,
        norm_eps=None if f["rms_norm_eps"] == LATENT_EPS else LATENT_EPS,
    )


def _experts(f: Fields) -> MixtureOfExperts:
    return MixtureOfExperts(
        experts=f["num_experts"],
        top_k=f["num_experts_per_token"],
        hidden=f["moe_intermediate_size"],
        router="sigmoid",
        renormalize=f["moe_renormalize"],
        scale=f["routed_scaling_factor"],
        groups=f["num_expert_group"],
        top_groups=f["topk_group"],
        shared_hidden=f["moe_intermediate_size"] * f["num_shared_experts"],
        balance_loss=0.0,
        z_loss=0.0,
        bias_rate=0.0,
    )


def _config(design: ModelConfig) -> dict[str, Any]:
    found = [place.layer for place in layers(design.slots)]
    k, a = first(design, KimiDeltaAttention, "kimi_linear"), first(design, LatentAttention, "kimi_linear")
    mixers, channels = [LINEAR if isinstance(x, KimiDeltaAttention) else FULL for x in found[::2]], found[1::2]
    kinds = ["sparse" if isinstance(layer, MixtureOfExperts) else "dense" for layer in channels]
    sizes: dict[str, Any] = {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(mixers),
        "layer_types": mixers,
        "mlp_layer_types": kinds,
        "first_k_dense_replace": kinds.index("sparse") if "sparse" in kinds else len(kinds),
        "rms_norm_eps": design.norm.eps,
        "tie_word_embeddings": design.tied,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.heads,
        "qk_nope_head_dim": a.nope_dim,
        "qk_rope_head_dim": a.rope_dim,
        "v_head_dim": a.value_dim,
        "kv_lora_rank": a.rank,
        "q_lora_rank": a.query_rank,
        "linear_attn_config": {
            "full_attn_layers": [i + 1 for i, kind in enumerate(mixers) if kind == FULL],
            "kda_layers": [i + 1 for i, kind in enumerate(mixers) if kind == LINEAR],
            "num_heads": k.heads,
            "head_dim": k.head_dim,
            "short_conv_kernel_size": k.conv_width,
        },
        **FIXED,
    }
    dense = next((layer for layer in channels if isinstance(layer, SwiGLU)), None)
    sparse = next((layer for layer in channels if isinstance(layer, MixtureOfExperts)), None)
    return (
        sizes
        | ({} if dense is None else {"intermediate_size": dense.hidden})
        | ({} if sparse is None else _of_experts(sparse))
    )


def _of_experts(e: MixtureOfExperts) -> dict[str, Any]:
    assert e.hidden is not None
    return {
        "num_experts": e.experts,
        "num_experts_per_token": e.top_k,
        "moe_intermediate_size": e.hidden,
        "moe_renormalize": e.renormalize,
        "routed_scaling_factor": e.scale,
        "num_expert_group": e.groups,
        "topk_group": e.top_groups,
        "num_shared_experts": (e.shared_hidden or 0) // e.hidden,
    }


def _tiny(draw: Random) -> dict[str, Any]:
    heads, count, groups = draw.choice([1, 2, 3]), draw.choice([2, 3, 4]), draw.choice([1, 2, 3])
    kinds = [LINEAR, FULL] + [draw.choice([LINEAR, FULL]) for _ in range(count - 2)]
    draw.shuffle(kinds)
    width = draw.choice([12, 20])
    return {
        "vocab_size": 97,
        "hidden_size": draw.choice([36, 44]),
        "num_hidden_layers": count,
        "layer_types": kinds,
        "mlp_layer_types": draw.choice([None, [draw.choice(["dense", "sparse"]) for _ in kinds]]),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "qk_nope_head_dim": draw.choice([6, 8]),
        "qk_rope_head_dim": draw.choice([4, 6]),
        "v_head_dim": draw.choice([7, 8]),
        "kv_lora_rank": draw.choice([10, 16]),
        "q_lora_rank": draw.choice([None, 14]),
        "intermediate_size": draw.choice([40, 52]),
        "moe_intermediate_size": width,
        "num_experts": groups * draw.choice([2, 3]),
        "num_expert_group": groups,
        "topk_group": draw.randint(1, groups),
        "num_experts_per_token": draw.choice([1, 2]),
        "num_shared_experts": draw.choice([1, 2]),
        "moe_renormalize": draw.random() < 0.7,
        "routed_scaling_factor": draw.choice([1.0, 2.446]),
        "linear_num_heads": draw.choice([1, 2, 3]),
        "linear_head_dim": draw.choice([6, 8]),
        "linear_conv_kernel_dim": draw.choice([3, 4]),
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


FAMILIES = (
    Family(
        model_type="kimi_linear",
        architecture="KimiLinearForCausalLM",
        design=_design,
        config=_config,
        slots=_slots,
        tiny=_tiny,
        holds=(KimiDeltaAttention, LatentAttention, SwiGLU, MixtureOfExperts),
    ),
)
