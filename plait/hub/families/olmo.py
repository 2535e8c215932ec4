"""OLMo 2 and 3: norms behind every layer and none before, all heads' queries and keys normed together, windows in the third."""

from random import Random
from typing import Any

from plait.design.layers import Attention, SwiGLU
from plait.design.model import ModelConfig
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
    swiglu,
    transformer_config,
    transformer_design,
    turns_by_type,
    window_config,
)
from plait.hub.families.tiny import transformer

RULES = (
    ATTENTION | {"after": "post_attention_layernorm"},
    SWIGLU | {"after": "post_feedforward_layernorm"},
)
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16}


def _olmo2(f: Fields) -> ModelConfig:
    a = attention(f, bias=f["attention_bias"], qk_norm="wide")
    layers = {"A": a, "F": swiglu(f)}
    return transformer_design(f, ["A"] * f["num_hidden_layers"], layers, wrap=Wrap(norms="after"))


def _olmo2_config(design: ModelConfig) -> dict[str, Any]:
    return transformer_config(design, "olmo2") | {"attention_bias": first(design, Attention, "olmo2").bias}


def _olmo3(f: Fields) -> ModelConfig:
    """Positions of layers that see a window may be stretched otherwise than those of layers that see all."""
    f.carried("num_hidden_layers")  # `layer_types` says it
    turns = turns_by_type(f)
    a = attention(f, bias=f["attention_bias"], qk_norm="wide", rope=turns[FULL])
    layers = {"A": a, "W": a.replace(rope=turns[SLIDING], window=f["sliding_window"]), "F": swiglu(f)}
    return transformer_design(f, mixer_letters(f), layers, wrap=Wrap(norms="after"))


def _olmo3_config(design: ModelConfig) -> dict[str, Any]:
    return _olmo2_config(design) | window_config(design) | by_type(design)


def _tiny_olmo2(draw: Random) -> dict[str, Any]:
    return transformer(draw, head_dim=False) | {"attention_bias": draw.random() < 0.3}


def _tiny_olmo3(draw: Random) -> dict[str, Any]:
    config = _tiny_olmo2(draw) | {"num_hidden_layers": 4, "sliding_window": draw.choice([3, 8])}
    turns = {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 5e5}}
    kinds = draw.choice([{}, {"layer_types": [FULL, SLIDING, SLIDING, FULL]}])
    return config | kinds | draw.choice([{}, {"rope_parameters": turns}])


def _family(model_type: str, architecture: str, design: Any, config: Any, tiny: Any) -> Family:
    return Family(
        model_type=model_type,
        architecture=f"{architecture}ForCausalLM",
        design=design,
        config=config,
        slots=blocks(*RULES),
        tiny=tiny,
        holds=(Attention, SwiGLU),
        alike=(("rope_parameters",),),
    )


FAMILIES = (
    _family("olmo2", "Olmo2", _olmo2, _olmo2_config, _tiny_olmo2),
    _family("olmo3", "Olmo3", _olmo3, _olmo3_config, _tiny_olmo3),
)
