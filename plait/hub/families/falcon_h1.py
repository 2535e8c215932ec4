"""Falcon-H1: Mamba-2 and attention side by side on one normed input, summed, with a multiplier on nearly everything."""

from random import Random
from typing import Any

from plait.design.ends import Logits, Tokens
from plait.design.layers import Attention, Mamba2, SwiGLU
from plait.design.merges import Sum
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.design.places import ParallelPlace
from plait.design.wrap import Wrap
from plait.hub.families.family import ENDS, Family, blocks, first
from plait.hub.families.fields import Fields, rope, rope_parameters
from plait.hub.families.mamba import mamba2_rules, steps, time_step_limit
from plait.hub.families.tiny import transformer

MAMBA, ATTENTION = "mixer.branches.0.layers.0", "mixer.branches.1.layers.0"
PARALLEL = {
    "norm": "input_layernorm",
    **{path.replace("mixer", MAMBA): name for path, name in mamba2_rules("", "mamba").items() if path != "norm"},
    f"{ATTENTION}.qkv_proj": "self_attn.{part}_proj",
    f"{ATTENTION}.o_proj": "self_attn.o_proj",
}
SWIGLU = {
    "norm": "pre_ff_layernorm",
    "mixer.up_proj": "feed_forward.{part}_proj",
    "mixer.down_proj": "feed_forward.down_proj",
}


def _design(f: Fields) -> ModelConfig:
    f.must(hidden_act="silu")
    f.carried("num_logits_to_keep")
    gate, down = f["mlp_multipliers"]
    weights = (f["ssm_out_multiplier"], f["attention_in_multiplier"] * f["attention_out_multiplier"])
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=f["hidden_size"],
        pattern=f"([M|A]F){f['num_hidden_layers']}",
        layers={
            "M": _mamba2(f),
            "A": _attention(f),
            "F": SwiGLU(hidden=f["intermediate_size"], bias=f["mlp_bias"], gate_scale=gate, wrap=Wrap(factor=down)),
        },
        merge=Sum(branch_norm=False, weights=() if weights == (1, 1) else weights),
        norm=RMSNorm(eps=f["rms_norm_eps"]),
        front=Tokens(scale=f["embedding_multiplier"]),
        head=Logits(scale=f["lm_head_multiplier"]),
        tie_embeddings=f["tie_word_embeddings"],
    )


def _attention(f: Fields) -> Attention:
    """What multiplies the input of linear maps multiplies their output: q, k and v, so the logits twice over."""
    heads, inside, biased = f["num_attention_heads"], f["attention_in_multiplier"], f["attention_bias"]
    _unbiased(f, "attention_in_multiplier", "attention_bias")
    size = f.get("head_dim") or f["hidden_size"] // heads
    by = f["key_multiplier"] * inside**2
    scale = None if by == 1 else size**-0.5 * by
    kv_heads = f["num_key_value_heads"]
    return Attention(heads=heads, kv_heads=kv_heads, head_dim=size, rope=rope(f), bias=biased, scale=scale)


def _mamba2(f: Fields) -> Mamba2:
    f.carried("mamba_chunk_size", "mamba_d_ssm", "mamba_expand")  # the heads say how wide it is
    _unbiased(f, "ssm_in_multiplier", "mamba_proj_bias")
    before = f["mamba_norm_before_gate"]
    multipliers = tuple(by * f["ssm_in_multiplier"] for by in f["ssm_multipliers"])
    return Mamba2(
        heads=f["mamba_n_heads"],
        head_dim=f["mamba_d_head"],
        state_dim=f["mamba_d_state"],
        groups=f["mamba_n_groups"],
        conv_width=f["mamba_d_conv"],
        conv_bias=f["mamba_conv_bias"],
        in_bias=f["mamba_proj_bias"],
        out_bias=f["projectors_bias"],
        output_norm=("norm_first" if before else "gate_first") if f["mamba_rms_norm"] else "none",
        multipliers=None if multipliers == (1,) * 5 else multipliers,
        **steps(f["time_step_limit"]),
    )


def _unbiased(f: Fields, multiplier: str, bias: str) -> None:
    if f[multiplier] != 1 and f[bias]:
        raise ValueError(
            f"{multiplier} {f[multiplier]} beside {bias} true is not supported; plait reads one or the other"
        )


def _config(design: ModelConfig) -> dict[str, Any]:
    m, a = first(design, Mamba2, "falcon_h1"), first(design, Attention, "falcon_h1")
    f = first(design, SwiGLU, "falcon_h1")
    slot = design.slots[0]
    merge = slot.merge if isinstance(slot, ParallelPlace) else None
    out = merge.weights if isinstance(merge, Sum) and merge.weights else (1.0, 1.0)
    scale = a.head_dim**-0.5
    return {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(design.slots) // 2,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "attention_bias": a.bias,
        "rope_parameters": None if a.rope is None else rope_parameters(a.rope),
        "key_multiplier": (a.scale or scale) / scale,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": out[1],
        **_mamba2_config(m),
        "ssm_out_multiplier": out[0],
        "intermediate_size": f.hidden,
        "mlp_bias": f.bias,
        "mlp_multipliers": [f.gate_scale, f.wrap.factor],
        "embedding_multiplier": design.front.scale,
        "lm_head_multiplier": design.head.scale,
        "rms_norm_eps": design.norm.eps,
        "tie_word_embeddings": design.tied,
    }


def _mamba2_config(m: Mamba2) -> dict[str, Any]:
    return {
        "mamba_n_heads": m.heads,
        "mamba_d_head": m.head_dim,
        "mamba_d_ssm": m.inner(),
        "mamba_d_state": m.state_dim,
        "mamba_n_groups": m.groups,
        "mamba_d_conv": m.conv_width,
        "mamba_conv_bias": m.conv_bias,
        "mamba_proj_bias": m.in_bias,
        "projectors_bias": m.out_bias,
        "mamba_rms_norm": m.output_norm != "none",
        "mamba_norm_before_gate": m.output_norm == "norm_first",
        "time_step_limit": time_step_limit(m),
        "ssm_multipliers": list(m.multipliers or (1.0,) * 5),
        "ssm_in_multiplier": 1.0,
    }


def _tiny(draw: Random) -> dict[str, Any]:
    attention_bias, proj_bias = draw.random() < 0.3, draw.random() < 0.3
    groups, each = draw.choice([(1, 3), (2, 2), (1, 1), (3, 1)])
    head_dim = draw.choice([8, 12])
    return transformer(draw) | {
        "mamba_n_heads": groups * each,
        "mamba_d_head": draw.choice(["auto", head_dim]),
        "mamba_d_ssm": groups * each * head_dim,
        "mamba_n_groups": groups,
        "mamba_d_state": draw.choice([5, 8]),
        "mamba_d_conv": draw.choice([4, 2]),
        "mamba_chunk_size": draw.choice([256, 16]),
        "mamba_rms_norm": draw.random() < 0.5,
        "mamba_norm_before_gate": draw.random() < 0.5,
        "mamba_conv_bias": draw.random() < 0.5,
        "mamba_proj_bias": proj_bias,
        "projectors_bias": draw.random() < 0.5,
        "attention_bias": attention_bias,
        "mlp_bias": draw.random() < 0.5,
        "time_step_limit": draw.choice([(0.0, float("inf")), (0.01, 0.5)]),
        "embedding_multiplier": draw.choice([1.0, 5.6]),
        "lm_head_multiplier": draw.choice([1.0, 0.039]),
        "key_multiplier": draw.choice([1.0, 0.39]),
        "attention_in_multiplier": 1.0 if attention_bias else draw.choice([1.0, 0.7]),
        "attention_out_multiplier": draw.choice([1.0, 0.9]),
        "ssm_in_multiplier": 1.0 if proj_bias else draw.choice([1.0, 1.25]),
        "ssm_out_multiplier": draw.choice([1.0, 0.23]),
        "ssm_multipliers": draw.choice([None, [0.35, 0.25, 0.18, 0.5, 0.31]]),
        "mlp_multipliers": draw.choice([None, [0.88, 0.58]]),
    }


FAMILIES = (
    Family(
        model_type="falcon_h1",
        architecture="FalconH1ForCausalLM",
        design=_design,
        config=_config,
        slots=blocks(PARALLEL, SWIGLU),
        tiny=_tiny,
        holds=(Mamba2, Attention, SwiGLU),
        ends={**ENDS, "norm": "model.final_layernorm"},
    ),
)
