"""Gemma 2 and 3, text: norms around every layer, times 1 + w, embeddings times the root of the width, GEGLU, windows."""

from random import Random
from typing import Any

from plait.design.ends import Logits, Tokens
from plait.design.layers import GEGLU, Attention
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.design.wrap import Wrap
from plait.hub.families.family import Family, blocks, first
from plait.hub.families.fields import Fields
from plait.hub.families.llama import (
    ATTENTION,
    FULL,
    SLIDING,
    SWIGLU,
    attention,
    by_type,
    mixer_letters,
    transformer_config,
    transformer_design,
    turns_by_type,
    window_config,
)
from plait.hub.families.tiny import transformer

RULES = (
    ATTENTION | {"after": "post_attention_layernorm"},
    SWIGLU | {"norm": "pre_feedforward_layernorm", "after": "post_feedforward_layernorm"},
)
TANH = "gelu_pytorch_tanh"


def _design(f: Fields, full: Attention, windowed: Attention) -> ModelConfig:
    f.must(hidden_activation=TANH, use_bidirectional_attention=False)
    f.carried("hidden_act", "cache_implementation", "sliding_window_size", "num_hidden_layers")
    return transformer_design(
        f,
        mixer_letters(f),
        {"A": full, "W": windowed, "F": GEGLU(hidden=f["intermediate_size"])},
        norm=RMSNorm(eps=f["rms_norm_eps"], zero_centered=True),
        wrap=Wrap(norms="both"),
        front=Tokens(scale=f["hidden_size"] ** 0.5),
        head=Logits(softcap=f.get("final_logit_softcapping")),
    )


def _attention(f: Fields, **more: Any) -> Attention:
    wide = f["query_pre_attn_scalar"]
    return attention(f, bias=f["attention_bias"], scale=None if wide == f["head_dim"] else wide**-0.5, **more)


def _config(design: ModelConfig, family: str) -> dict[str, Any]:
    a = first(design, Attention, family)
    return (
        transformer_config(design, family, GEGLU)
        | window_config(design)
        | {
            "hidden_activation": TANH,
            "attention_bias": a.bias,
            "query_pre_attn_scalar": a.head_dim if a.scale is None else round(a.scale**-2),
            "final_logit_softcapping": design.head.softcap,
        }
    )


def _gemma2(f: Fields) -> ModelConfig:
    a = _attention(f, softcap=f.get("attn_logit_softcapping"))
    return _design(f, a, a.replace(window=f["sliding_window"]))


def _gemma2_config(design: ModelConfig) -> dict[str, Any]:
    return _config(design, "gemma2") | {"attn_logit_softcapping": first(design, Attention, "gemma2").softcap}


def _gemma3(f: Fields) -> ModelConfig:
    """Layers that see a window turn by other angles than those that see all."""
    f.must(attn_logit_softcapping=None)  # which transformers' class leaves out
    f.carried("_sliding_window_pattern", "sliding_window_pattern")  # `layer_types` says what comes of it
    turns = turns_by_type(f)
    a = _attention(f, qk_norm=True, rope=turns[FULL])
    return _design(f, a, a.replace(rope=turns[SLIDING], window=f["sliding_window"]))


def _gemma3_config(design: ModelConfig) -> dict[str, Any]:
    return _config(design, "gemma3_text") | by_type(design)


def _tiny(draw: Random) -> dict[str, Any]:
    config = transformer(draw)
    size = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config | {
        "head_dim": size,
        "num_hidden_layers": 3,
        "layer_types": draw.choice([None, [FULL] * 3, [SLIDING, SLIDING, FULL]]),
        "sliding_window": draw.choice([3, 8]),
        "query_pre_attn_scalar": draw.choice([size, size, 7]),
        "final_logit_softcapping": draw.choice([None, 5.0]),
        "attention_bias": draw.random() < 0.3,
    }


def _tiny_gemma2(draw: Random) -> dict[str, Any]:
    return _tiny(draw) | {"attn_logit_softcapping": draw.choice([None, 3.0])}


def _tiny_gemma3(draw: Random) -> dict[str, Any]:
    scaled = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    full = draw.choice([{"rope_type": "default", "rope_theta": 1e6}, scaled])
    turns = {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}
    return _tiny(draw) | draw.choice([{}, {"rope_parameters": turns}])


FAMILIES = (
    Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        design=_gemma2,
        config=_gemma2_config,
        slots=blocks(*RULES),
        tiny=_tiny_gemma2,
        holds=(Attention, GEGLU),
    ),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        design=_gemma3,
        config=_gemma3_config,
        slots=blocks(*RULES),
        tiny=_tiny_gemma3,
        holds=(Attention, GEGLU),
        # beside what sees images, as transformers names them today and as published files do
        within=(
            ("model.language_model.", "model."),
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
        ),
        aliases=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
        alike=(("rope_parameters",),),
    ),
)
