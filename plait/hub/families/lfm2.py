"""LFM2: gated short convolutions, and attention in a few layers."""

from random import Random
from typing import Any

from plait.design.layers import Attention, GatedConv, SwiGLU
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.design.places import layers
from plait.hub.families.family import ENDS, Family, by_kind, first, pattern
from plait.hub.families.fields import Fields, rope, rope_parameters
from plait.hub.families.tiny import transformer
from plait.hub.weight_table import Rows

LETTER = {"full_attention": "A", "conv": "C"}
ATTENTION = {
    "norm": "operator_norm",
    "mixer.qkv_proj": "self_attn.{part}_proj",
    "mixer.o_proj": "self_attn.out_proj",
    "mixer.q_norm": "self_attn.q_layernorm",
    "mixer.k_norm": "self_attn.k_layernorm",
}
CONV = {
    "norm": "operator_norm",
    "mixer.in_proj": "conv.in_proj",
    "mixer.conv1d": "conv.conv",
    "mixer.out_proj": "conv.out_proj",
}
SWIGLU = {
    "norm": "ffn_norm",
    "mixer.up_proj": (Rows("feed_forward.w1", ("gate",)), Rows("feed_forward.w3", ("up",))),
    "mixer.down_proj": "feed_forward.w2",
}


def _design(f: Fields) -> ModelConfig:
    f.carried("full_attn_idxs", "num_hidden_layers")  # `layer_types` says what comes of them
    turned = rope(f)
    f.must(theta=turned.theta)  # of which older classes took the angles, before `rope_theta`
    heads = f["num_attention_heads"]
    size = f.get("head_dim") or f["hidden_size"] // heads
    kinds = {
        "A": Attention(heads=heads, kv_heads=f["num_key_value_heads"], head_dim=size, qk_norm=True, rope=turned),
        "C": GatedConv(conv_width=f["conv_L_cache"], bias=f["conv_bias"]),
        "F": SwiGLU(hidden=_hidden(f)),
    }
    letters = [letter for mixer in f.each_of("layer_types", LETTER) for letter in (mixer, "F")]
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=f["hidden_size"],
        pattern=pattern(letters),
        layers={letter: layer for letter, layer in kinds.items() if letter in letters},
        norm=RMSNorm(eps=f["norm_eps"]),
        tie_embeddings=f["tie_word_embeddings"],
    )


def _hidden(f: Fields) -> int:
    """Of a config that gives the width before it is cut to two thirds and rounded, or as it is."""
    hidden, multiple = f["intermediate_size"], f["block_multiple_of"]
    factor = f["block_ffn_dim_multiplier"]
    return -(-int(factor * int(2 * hidden / 3)) // multiple) * multiple if f["block_auto_adjust_ff_dim"] else hidden


def _config(design: ModelConfig) -> dict[str, Any]:
    a, c = first(design, Attention, "lfm2"), first(design, GatedConv, "lfm2")
    f = first(design, SwiGLU, "lfm2")
    assert a.rope is not None
    return {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(design.slots) // 2,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "rope_parameters": rope_parameters(a.rope),
        "intermediate_size": f.hidden,
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": c.conv_width,
        "conv_bias": c.bias,
        "layer_types": [
            "conv" if isinstance(place.layer, GatedConv) else "full_attention"
            for place in layers(design.slots)
            if not isinstance(place.layer, SwiGLU)
        ],
        "norm_eps": design.norm.eps,
        "tie_word_embeddings": design.tied,
    }


def _tiny(draw: Random) -> dict[str, Any]:
    config = transformer(draw)
    kinds = draw.choice(
        [["conv", "full_attention"], ["full_attention", "conv", "conv"], ["conv", "conv", "full_attention"]]
    )
    widths = [
        {"block_auto_adjust_ff_dim": False},
        {"block_multiple_of": 8, "block_ffn_dim_multiplier": draw.choice([1.0, 1.3])},
    ]
    config["norm_eps"] = config.pop("rms_norm_eps")
    config |= {"layer_types": kinds, "num_hidden_layers": len(kinds)} | draw.choice(widths)
    return config | {"conv_L_cache": draw.choice([3, 4, 2]), "conv_bias": draw.random() < 0.5}


FAMILIES = (
    Family(
        model_type="lfm2",
        architecture="Lfm2ForCausalLM",
        design=_design,
        config=_config,
        slots=by_kind({Attention: ATTENTION, GatedConv: CONV, SwiGLU: SWIGLU}, per=2),
        tiny=_tiny,
        holds=(Attention, GatedConv, SwiGLU),
        ends={**ENDS, "norm": "model.embedding_norm"},
    ),
)
