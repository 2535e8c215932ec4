"""Phi-3 and Phi-4: Llama's layers with fused matrices, where a part of each head may turn."""

from random import Random
from typing import Any

from plait.design.layers import Attention, RoPE, SwiGLU
from plait.design.layers.rope import LongRoPE
from plait.design.model import ModelConfig
from plait.hub.families.family import Family, blocks, first
from plait.hub.families.fields import Fields, rope, rope_parameters
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


def _design(f: Fields) -> ModelConfig:
    """Texts longer than the original positions, which turn by `long_factor` throughout, are refused."""
    f.must(attention_bias=False, mlp_bias=False, lm_head_bias=False, full_attn_mod=1, interpolate_factor=1)
    f.carried("original_max_position_embeddings", "partial_rotary_factor")  # `rope_parameters` has what comes of them
    long = f["rope_parameters"]["rope_type"] == "longrope"
    a = attention(f, window=f.get("sliding_window"), rope=_long(f) if long else rope(f, partial=True))
    return transformer_design(f, ["A"] * f["num_hidden_layers"], {"A": a, "F": swiglu(f)})


def _long(f: Fields) -> RoPE:
    given = Fields(f["rope_parameters"], f"{f.where}: rope_parameters")
    given.carried("rope_type", "type", "long_factor")
    original = given["original_max_position_embeddings"]
    scaling = LongRoPE(
        factor=given.get("factor") or f["max_position_embeddings"] / original,
        original=original,
        factors=given["short_factor"],
        attention_factor=given.get("attention_factor"),
    )
    found = RoPE(
        theta=float(given["rope_theta"]),
        fraction=given.get("partial_rotary_factor", 1.0),
        max_positions=original,
        scaling=scaling,
    )
    given.check()
    return found


def _config(design: ModelConfig) -> dict[str, Any]:
    a = first(design, Attention, "phi3")
    return (
        transformer_config(design, "phi3") | {"sliding_window": a.window} | ({} if a.rope is None else _turns(a.rope))
    )


def _turns(turned: RoPE) -> dict[str, Any]:
    """One row of factors for texts of any length, where no config says how longer ones are to turn."""
    parameters = rope_parameters(turned, partial=True)
    if not isinstance(turned.scaling, LongRoPE):
        return {"rope_parameters": parameters}
    s, original = turned.scaling, {"original_max_position_embeddings": turned.scaling.original}
    attention = {} if s.attention_factor is None else {"attention_factor": s.attention_factor}
    factors = {"short_factor": list(s.factors), "long_factor": list(s.factors), "factor": s.factor}
    return original | {"rope_parameters": parameters | {"rope_type": "longrope"} | original | factors | attention}


def _tiny(draw: Random) -> dict[str, Any]:
    config: dict[str, Any] = transformer(draw, head_dim=False) | {"sliding_window": draw.choice([None, 5])}
    size = config["hidden_size"] // config["num_attention_heads"]
    part = draw.choice([0.5, 0.75, 1.0] if size % 8 == 0 else [1.0])  # an odd number of channels does not turn
    turns = {"rope_type": "default", "rope_theta": 250_000.0, "partial_rotary_factor": part}
    pairs, original = int(size * part) // 2, {"original_max_position_embeddings": 64}
    long = {"short_factor": [1 + i / 7 for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    return config | draw.choice(
        [
            {},
            {"rope_parameters": turns},
            original | {"rope_parameters": turns | long | {"rope_type": "longrope"}},
        ]
    )


FAMILIES = (
    Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        design=_design,
        config=_config,
        slots=blocks(*RULES),
        tiny=_tiny,
        holds=(Attention, SwiGLU),
        alike=(("rope_parameters", "original_max_position_embeddings"),),
        aliases=(r".*rotary_emb\.inv_freq",),
    ),
)
