"""Qwen3-Next and the text models of Qwen3.5: gated DeltaNet and gated attention, dense or with experts."""

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from plait.design.layers import Attention, GatedDeltaNet, Layer, MixtureOfExperts, SwiGLU
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.design.places import layers
from plait.hub.families.family import Family, Named, pattern
from plait.hub.families.fields import Fields, rope, rope_parameters
from plait.hub.families.llama import FULL, SWIGLU, attention, swiglu
from plait.hub.families.tiny import transformer
from plait.hub.weight_table import Either, Place, Rows, Rules

LINEAR = "linear_attention"
MROPE = ("mrope_section", "mrope_interleaved")  # which axis of an image turns which pair; in a text all axes are one
GATED = {
    "norm": "input_layernorm",
    "mixer.o_proj": "self_attn.o_proj",
    "mixer.q_norm": "self_attn.q_norm",
    "mixer.k_norm": "self_attn.k_norm",
}
DELTA = {
    "norm": "input_layernorm",
    "mixer.conv1d": "linear_attn.conv1d",
    "mixer.A_log": "linear_attn.A_log",
    "mixer.dt_bias": "linear_attn.dt_bias",
    "mixer.norm": "linear_attn.norm",
    "mixer.out_proj": "linear_attn.out_proj",
}
SPLIT = (
    Rows("linear_attn.in_proj_qkv", ("q", "k", "v")),
    *(Rows(f"linear_attn.in_proj_{part}", (part,)) for part in "zba"),
)
EXPERTS = {
    "norm": "post_attention_layernorm",
    "mixer.router": "mlp.gate.weight",
    "mixer.shared_up_proj": "mlp.shared_expert.{part}_proj",
    "mixer.shared_down_proj": "mlp.shared_expert.down_proj",
    "mixer.shared_gate": "mlp.shared_expert_gate.weight",
}
SINGLE: tuple[Place, Place] = "mlp.experts.{expert}.{part}_proj.weight", "mlp.experts.{expert}.down_proj.weight"
STACKED: tuple[Place, Place] = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


MOE = (  # of no use where no layer has experts
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "router_aux_loss_coef",
    "output_router_logits",
)


def gated_attention(layer: Attention) -> Rules:
    """Every head's q and its gate are beside each other."""
    q = Rows("self_attn.q_proj", ("q", "gate"), groups=layer.heads)
    return {**GATED, "mixer.qkv_proj": (q, Rows("self_attn.k_proj", ("k",)), Rows("self_attn.v_proj", ("v",)))}


def interleaved(layer: GatedDeltaNet) -> Rules:
    """Qwen3-Next's: with each head of keys lie the values, gates, strengths and decays that it serves."""
    qkvz = Rows("linear_attn.in_proj_qkvz", ("q", "k", "v", "z"), groups=layer.heads)
    return {**DELTA, "mixer.in_proj": (qkvz, Rows("linear_attn.in_proj_ba", ("b", "a"), groups=layer.heads))}


def experts(*choices: tuple[Place, Place]) -> Rules:
    up, down = (Either(places) for places in zip(*choices, strict=True))
    return {**EXPERTS, "mixer.experts_up": up, "mixer.experts_down": down}


def _slots(delta: Callable[[GatedDeltaNet], Rules], moe: Rules) -> Callable[[ModelConfig], Iterator[Named]]:
    def rules(layer: Layer) -> Rules:
        if isinstance(layer, Attention):
            return gated_attention(layer)
        if isinstance(layer, GatedDeltaNet):
            return delta(layer)
        return moe if isinstance(layer, MixtureOfExperts) else SWIGLU

    def named(design: ModelConfig) -> Iterator[Named]:
        for i, place in enumerate(layers(design.slots)):
            yield Named(f"slots.{i}.", f"model.layers.{i // 2}.", rules(place.layer))

    return named


def _design(f: Fields, channels: list[str], bound: dict[str, Layer]) -> ModelConfig:
    """channels: the letter of each layer's channel mixer."""
    f.must(hidden_act="silu")
    f.carried("num_hidden_layers", "full_attention_interval", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    f.must(attn_output_gate=True, mamba_ssm_dtype="float32", use_sliding_window=False)
    turned = rope(f, {name: value for name, value in f["rope_parameters"].items() if name not in MROPE}, partial=True)
    bound |= {
        "A": attention(f, bias=f["attention_bias"], qk_norm=True, output_gate=True, rope=turned),
        "D": GatedDeltaNet(
            heads=f["linear_num_key_heads"],
            head_dim=f["linear_key_head_dim"],
            value_heads=f["linear_num_value_heads"],
            value_head_dim=f["linear_value_head_dim"],
            conv_width=f["linear_conv_kernel_dim"],
        ),
    }
    kinds = {FULL: "A", LINEAR: "D"}
    mixers = [Fields({"layer_types": kind}, f.where).one_of("layer_types", kinds) for kind in f["layer_types"]]
    letters = [letter for pair in zip(mixers, channels, strict=True) for letter in pair]
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=f["hidden_size"],
        pattern=pattern(letters),
        layers={letter: layer for letter, layer in bound.items() if letter in letters},
        norm=RMSNorm(eps=f["rms_norm_eps"], zero_centered=True),
        tie_embeddings=f["tie_word_embeddings"],
    )


def _moe(f: Fields, renormalize: bool) -> MixtureOfExperts:
    f.carried("output_router_logits")
    return MixtureOfExperts(
        experts=f["num_experts"],
        top_k=f["num_experts_per_tok"],
        hidden=f["moe_intermediate_size"],
        renormalize=renormalize,
        shared_hidden=f["shared_expert_intermediate_size"],
        shared_gate=True,
        balance_loss=f["router_aux_loss_coef"],
        z_loss=0.0,
    )


def _next(f: Fields) -> ModelConfig:
    dense, step, count = f["mlp_only_layers"], f["decoder_sparse_step"], f["num_hidden_layers"]
    some = f["num_experts"] > 0
    f.carried(*MOE)
    kinds = ["E" if some and i not in dense and (i + 1) % step == 0 else "F" for i in range(count)]
    moe: dict[str, Layer] = {"E": _moe(f, f["norm_topk_prob"])} if "E" in kinds else {}
    return _design(f, kinds, {"F": swiglu(f)} | moe)


def _dense(f: Fields) -> ModelConfig:
    f.must(mlp_only_layers=([],))
    return _design(f, ["F"] * f["num_hidden_layers"], {"F": swiglu(f)})


def _sparse(f: Fields) -> ModelConfig:
    f.must(mlp_only_layers=([],))
    return _design(f, ["E"] * f["num_hidden_layers"], {"E": _moe(f, True)})


def _config(design: ModelConfig) -> dict[str, Any]:
    """What all of them say alike."""
    found = [place.layer for place in layers(design.slots)]
    config: dict[str, Any] = {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(found) // 2,
        "layer_types": [FULL if isinstance(layer, Attention) else LINEAR for layer in found[::2]],
        "rms_norm_eps": design.norm.eps,
        "tie_word_embeddings": design.tied,
    }
    for kind, said in SAID.items():
        layer = next((layer for layer in found if isinstance(layer, kind)), None)
        config |= {} if layer is None else said(layer)
    return config


def _of_attention(a: Attention) -> dict[str, Any]:
    sizes = {"num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "head_dim": a.head_dim}
    turned = {} if a.rope is None else {"rope_parameters": rope_parameters(a.rope, partial=True)}
    return sizes | turned | {"attention_bias": a.bias is True}


def _of_delta(d: GatedDeltaNet) -> dict[str, Any]:
    return {
        "linear_num_key_heads": d.heads,
        "linear_key_head_dim": d.head_dim,
        "linear_num_value_heads": d.value_heads,
        "linear_value_head_dim": d.value_head_dim,
        "linear_conv_kernel_dim": d.conv_width,
    }


def _of_experts(e: MixtureOfExperts) -> dict[str, Any]:
    return {
        "num_experts": e.experts,
        "num_experts_per_tok": e.top_k,
        "moe_intermediate_size": e.hidden,
        "shared_expert_intermediate_size": e.shared_hidden,
        "router_aux_loss_coef": e.balance_loss,
    }


SAID: dict[type[Layer], Callable[[Any], dict[str, Any]]] = {
    Attention: _of_attention,
    GatedDeltaNet: _of_delta,
    SwiGLU: lambda f: {"intermediate_size": f.hidden},
    MixtureOfExperts: _of_experts,
}


def _next_config(design: ModelConfig) -> dict[str, Any]:
    channels = [place.layer for place in layers(design.slots)][1::2]
    chosen = [layer for layer in channels if isinstance(layer, MixtureOfExperts)]
    dense = [i for i, layer in enumerate(channels) if not isinstance(layer, MixtureOfExperts)]
    normed = {"norm_topk_prob": chosen[0].renormalize} if chosen else {"num_experts": 0}
    return _config(design) | normed | {"decoder_sparse_step": 1, "mlp_only_layers": dense if chosen else []}


def _tiny(draw: Random) -> dict[str, Any]:
    config = transformer(draw)
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    share = draw.choice([0.25, 0.5, 1.0] if head_dim % 8 == 0 else [0.5, 1.0])
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    turned = {"rope_theta": 1e4, "partial_rotary_factor": share} | draw.choice([{"rope_type": "default"}, yarn])
    keys, count = draw.choice([1, 2, 3]), draw.choice([2, 3, 4])
    kinds = draw.choice([None, [draw.choice([FULL, LINEAR]) for _ in range(count)]])
    return config | {
        "num_hidden_layers": count,
        "layer_types": kinds,
        "head_dim": head_dim,
        "rope_parameters": turned,
        "attention_bias": draw.random() < 0.3,
        "linear_num_key_heads": keys,
        "linear_num_value_heads": keys * draw.choice([1, 2, 3]),
        "linear_key_head_dim": draw.choice([6, 8]),
        "linear_value_head_dim": draw.choice([5, 8, 12]),
        "linear_conv_kernel_dim": draw.choice([3, 4]),
    }


def _tiny_experts(draw: Random) -> dict[str, Any]:
    config = {name: value for name, value in _tiny(draw).items() if name != "intermediate_size"}
    return config | {
        "num_experts": draw.choice([4, 7]),
        "num_experts_per_tok": draw.choice([1, 2, 3]),
        "moe_intermediate_size": draw.choice([12, 20]),
        "shared_expert_intermediate_size": draw.choice([12, 24]),
    }


def _tiny_next(draw: Random) -> dict[str, Any]:
    sparse = draw.choice([{}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}, {"num_experts": 0}])
    return _tiny_experts(draw) | {"norm_topk_prob": draw.random() < 0.7, "intermediate_size": 44} | sparse


def _tiny_dense(draw: Random) -> dict[str, Any]:
    section = {"mrope_section": [1, 1, 0], "mrope_interleaved": True} if draw.random() < 0.5 else {}
    config = _tiny(draw)
    return config | {"rope_parameters": config["rope_parameters"] | section}


def _family(
    model_type: str, architecture: str, design: Any, config: Any, tiny: Any, slots: Any, *channels: Any
) -> Family:
    return Family(
        model_type=model_type,
        architecture=architecture,
        design=design,
        config=config,
        slots=slots,
        tiny=tiny,
        holds=(Attention, GatedDeltaNet, *channels),
        # the layers that guess several tokens ahead, which transformers does not run either, and what sees images
        aliases=(r"mtp\..*", r"model\.visual\..*"),
        alike=(("mlp_only_layers", "decoder_sparse_step", "num_experts"), ("rope_parameters",)),
        within=(("model.language_model.", "model."),),
    )


def split(_: GatedDeltaNet) -> Rules:
    return {**DELTA, "mixer.in_proj": SPLIT}


NEXT, DENSE = _slots(interleaved, experts(SINGLE, STACKED)), _slots(split, experts(STACKED))
FAMILIES = (
    _family("qwen3_next", "Qwen3NextForCausalLM", _next, _next_config, _tiny_next, NEXT, SwiGLU, MixtureOfExperts),
    _family("qwen3_5_text", "Qwen3_5ForCausalLM", _dense, _config, _tiny_dense, DENSE, SwiGLU),
    _family(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        _sparse,
        _config,
        _tiny_experts,
        _slots(split, experts(STACKED, SINGLE)),
        MixtureOfExperts,
    ),
)
