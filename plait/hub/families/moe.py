"""Transformers with experts: Mixtral, Qwen2-MoE, Qwen3-MoE."""

from random import Random
from typing import Any

from plait.design.layers import Attention, MixtureOfExperts, SwiGLU
from plait.design.model import ModelConfig
from plait.hub.families.family import Family, by_kind, first
from plait.hub.families.fields import Fields
from plait.hub.families.llama import (
    ATTENTION,
    FULL,
    SLIDING,
    SWIGLU,
    attention,
    attention_config,
    mixer_letters,
    swiglu,
    transformer_design,
    window_config,
)
from plait.hub.families.tiny import transformer
from plait.hub.weight_table import Rows, Rules

ROUTED: Rules = {
    "norm": "post_attention_layernorm",
    "mixer.router": "mlp.gate.weight",
    "mixer.experts_up": "mlp.experts.{expert}.{part}_proj.weight",
    "mixer.experts_down": "mlp.experts.{expert}.down_proj.weight",
}
SHARED: Rules = {
    "mixer.shared_up_proj": "mlp.shared_expert.{part}_proj",
    "mixer.shared_down_proj": "mlp.shared_expert.down_proj",
    "mixer.shared_gate": "mlp.shared_expert_gate.weight",
}
MIXTRAL: Rules = {
    "norm": "post_attention_layernorm",
    "mixer.router": "block_sparse_moe.gate.weight",
    "mixer.experts_up": (
        Rows("block_sparse_moe.experts.{expert}.w1.weight", ("gate",)),
        Rows("block_sparse_moe.experts.{expert}.w3.weight", ("up",)),
    ),
    "mixer.experts_down": "block_sparse_moe.experts.{expert}.w2.weight",
}
TRAINED = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")


def routed(f: Fields, **more: Any) -> MixtureOfExperts:
    """Experts without losses that keep them even: what is trained on says which of those it wants."""
    f.must(hidden_act="silu")
    f.carried(*TRAINED)
    return MixtureOfExperts(top_k=f["num_experts_per_tok"], balance_loss=0.0, z_loss=0.0, **more)


def sparse(f: Fields, experts: int) -> list[str]:
    """E for blocks with experts, F for those without."""
    step, dense, blocks = f["decoder_sparse_step"], f["mlp_only_layers"], range(f["num_hidden_layers"])
    return ["E" if experts and i not in dense and (i + 1) % step == 0 else "F" for i in blocks]


def _qwen(f: Fields, letters: list[str], a: Attention, experts: int, **more: Any) -> ModelConfig:
    channels = sparse(f, experts)
    layers = {"A": a, "W": a.replace(window=f.get("sliding_window") or None), "F": swiglu(f)}
    own = {"hidden": f["moe_intermediate_size"], "renormalize": f["norm_topk_prob"], **more}
    f.carried("num_experts_per_tok", *TRAINED)  # where no block has experts
    if "E" in channels:
        layers["E"] = routed(f, experts=experts, **own)
    return transformer_design(f, letters, layers, channels)


def _qwen3(f: Fields) -> ModelConfig:
    f.carried("use_sliding_window", "max_window_layers")  # there is no `sliding_window` where there are no windows
    letter = "W" if f.get("sliding_window") else "A"
    a = attention(f, bias=f["attention_bias"], qk_norm=True)
    return _qwen(f, [letter] * f["num_hidden_layers"], a, f["num_local_experts"])


def _qwen2(f: Fields) -> ModelConfig:
    f.carried("use_sliding_window", "max_window_layers")  # `layer_types` says what comes of them
    a = attention(f, bias=("q", "k", "v") if f["qkv_bias"] else False)
    shared = {"shared_hidden": f["shared_expert_intermediate_size"], "shared_gate": True}
    return _qwen(f, mixer_letters(f), a, f["num_experts"], **shared)


def _mixtral(f: Fields) -> ModelConfig:
    a = attention(f, window=f.get("sliding_window"))
    blocks = f["num_hidden_layers"]
    experts = routed(f, experts=f["num_local_experts"], hidden=f["intermediate_size"])
    return transformer_design(f, ["A"] * blocks, {"A": a, "E": experts}, ["E"] * blocks)


def _experts_config(design: ModelConfig, family: str) -> dict[str, Any]:
    e = first(design, MixtureOfExperts, family)
    kinds = [slot.layer for slot in design.slots[1::2]]  # type: ignore[union-attr]  # no parallel slot passes `holds`
    dense = {i: layer for i, layer in enumerate(kinds) if isinstance(layer, SwiGLU)}
    return attention_config(design, family) | {
        "num_experts": e.experts,
        "num_experts_per_tok": e.top_k,
        "moe_intermediate_size": e.hidden,
        "norm_topk_prob": e.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(dense),
        **({"intermediate_size": next(iter(dense.values())).hidden} if dense else {}),
    }


def _qwen3_config(design: ModelConfig) -> dict[str, Any]:
    a = first(design, Attention, "qwen3_moe")
    windows = {"attention_bias": a.bias, "sliding_window": a.window, "use_sliding_window": a.window is not None}
    return _experts_config(design, "qwen3_moe") | windows


def _qwen2_config(design: ModelConfig) -> dict[str, Any]:
    e, windows = first(design, MixtureOfExperts, "qwen2_moe"), window_config(design)
    own = {"shared_expert_intermediate_size": e.shared_hidden, "use_sliding_window": SLIDING in windows["layer_types"]}
    biased = bool(first(design, Attention, "qwen2_moe").bias)
    return _experts_config(design, "qwen2_moe") | windows | own | {"qkv_bias": biased}


def _mixtral_config(design: ModelConfig) -> dict[str, Any]:
    a, e = first(design, Attention, "mixtral"), first(design, MixtureOfExperts, "mixtral")
    own = {"num_local_experts": e.experts, "num_experts_per_tok": e.top_k, "intermediate_size": e.hidden}
    return attention_config(design, "mixtral") | own | {"sliding_window": a.window}


def _tiny(draw: Random, head_dim: bool = True) -> dict[str, Any]:
    experts = draw.choice([3, 5])
    dense = draw.choice([{}, {"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
    return (
        transformer(draw, head_dim)
        | dense
        | {
            "num_experts": experts,
            "num_experts_per_tok": draw.choice([1, 2, experts]),
            "moe_intermediate_size": draw.choice([24, 40]),
            "norm_topk_prob": draw.random() < 0.5,
        }
    )


def _tiny_qwen3(draw: Random) -> dict[str, Any]:
    windows = draw.choice([{}, {}, {"use_sliding_window": True, "sliding_window": 4}])
    return _tiny(draw) | windows | {"attention_bias": draw.random() < 0.5}


def _tiny_qwen2(draw: Random) -> dict[str, Any]:
    config = _tiny(draw, head_dim=False) | {"shared_expert_intermediate_size": 28, "qkv_bias": draw.random() < 0.7}
    kinds = [draw.choice([FULL, SLIDING]) for _ in range(config["num_hidden_layers"])]
    windows = {"use_sliding_window": True, "sliding_window": 4, "layer_types": kinds}
    return config | draw.choice([{}, {}, windows])


def _tiny_mixtral(draw: Random) -> dict[str, Any]:
    experts = {"num_local_experts": draw.choice([3, 5]), "num_experts_per_tok": draw.choice([1, 2, 3])}
    return transformer(draw) | experts | {"sliding_window": draw.choice([None, 4])}


def _family(model_type: str, architecture: str, design: Any, config: Any, tiny: Any, experts: Rules) -> Family:
    return Family(
        model_type=model_type,
        architecture=f"{architecture}ForCausalLM",
        design=design,
        config=config,
        slots=by_kind({Attention: ATTENTION, SwiGLU: SWIGLU, MixtureOfExperts: experts}, per=2),
        tiny=tiny,
        holds=(Attention, MixtureOfExperts) if model_type == "mixtral" else (Attention, SwiGLU, MixtureOfExperts),
        alike=(("decoder_sparse_step", "mlp_only_layers"), ("head_dim",)),
        aliases=(r".*rotary_emb\.inv_freq",),
    )


FAMILIES = (
    _family("qwen3_moe", "Qwen3Moe", _qwen3, _qwen3_config, _tiny_qwen3, ROUTED),
    _family("qwen2_moe", "Qwen2Moe", _qwen2, _qwen2_config, _tiny_qwen2, {**ROUTED, **SHARED}),
    _family("mixtral", "Mixtral", _mixtral, _mixtral_config, _tiny_mixtral, MIXTRAL),
)
