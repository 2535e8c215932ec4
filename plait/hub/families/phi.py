"""Phi-3 and Phi-4: Llama's layers with fused matrices, where a part of each head may turn."""

from random import Random
from typing import Any

from plait.design.layers import Attention, SwiGLU
from plait.design.model import ModelConfig
from plait.hub.families.family import Family, blocks, first
from plait.hub.families.fields import Fields, rope_parameters
from plait.hub.families.llama import (
    ATTENTION,
    SWIGLU,
    attention,
    swiglu,
    transformer_config,
    transformer_design,
)
from plait.hub.families.tiny import transformer

RULES = (
    ATTENTION | {"mixer.qkv_proj": "self_attn.qkv_proj"},
    SWIGLU | {"mixer.up_proj": "mlp.gate_up_proj"},
)
LONG = (
    "rope_type 'longrope' turns every position by other angles once a text is longer than "
    "original_max_position_embeddings, so that keys which are kept would no longer be right; plait reads 'default'"
)


def _design(f: Fields) -> ModelConfig:
    f.must(attention_bias=False, mlp_bias=False, lm_head_bias=False, full_attn_mod=1, interpolate_factor=1)
    f.carried("original_max_position_embeddings", "partial_rotary_factor")  # `rope_parameters` has what comes of them
    if f["rope_parameters"]["rope_type"] == "longrope":
        raise ValueError(f"{f.where}: {LONG}")
    a = attention(f, window=f.get("sliding_window"))
    return transformer_design(f, ["A"] * f["num_hidden_layers"], {"A": a, "F": swiglu(f)})


def _config(design: ModelConfig) -> dict[str, Any]:
    a = first(design, Attention, "phi3")
    turns = {} if a.rope is None else {"rope_parameters": rope_parameters(a.rope, partial=True)}
    return transformer_config(design, "phi3") | {"sliding_window": a.window} | turns


def _tiny(draw: Random) -> dict[str, Any]:
    turns = {"rope_type": "default", "rope_theta": 250_000.0, "partial_rotary_factor": draw.choice([0.5, 0.75])}
    part = draw.choice([{}, {"rope_parameters": turns}])
    config: dict[str, Any] = transformer(draw, head_dim=False) | {"sliding_window": draw.choice([None, 5])}
    size = config["hidden_size"] // config["num_attention_heads"]
    return config | (part if size % 8 == 0 else {})  # an odd number of channels does not turn


FAMILIES = (
    Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        design=_design,
        config=_config,
        slots=blocks(*RULES),
        tiny=_tiny,
        holds=(Attention, SwiGLU),
        aliases=(r".*rotary_emb\.inv_freq",),
    ),
)
