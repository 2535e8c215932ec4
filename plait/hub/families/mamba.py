"""Mamba and Mamba-2: the same slot all the way. What is here of Mamba-2's layer serves the hybrids too."""

import math
from random import Random
from typing import Any

from plait.design.layers import Layer, Mamba, Mamba2
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.hub.families.family import Family, blocks, first, pattern
from plait.hub.families.fields import Fields
from plait.hub.families.tiny import mamba2_sizes
from plait.hub.weight_table import Rules

ENDS = {"embed": "backbone.embeddings", "norm": "backbone.norm_f", "lm_head": "lm_head"}
SILU = ("silu", "swish")
STARTS = ("time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual")  # how weights are drawn


def mamba2_rules(norm: str, inside: str) -> Rules:
    names = ("in_proj", "conv1d", "A_log", "dt_bias", "D", "norm", "out_proj")
    return {"norm": norm, **{f"mixer.{name}": f"{inside}.{name}" for name in names}}


def mamba_rules(norm: str, inside: str) -> Rules:
    """Beside the layers' own names: norms, which Jamba has, and the steps' bias, which is that of their projection."""
    names = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj")
    normed = {f"mixer.{name}_norm": f"{inside}.{name.lower()}_layernorm" for name in ("dt", "B", "C")}
    own = {f"mixer.{name}": f"{inside}.{name}" for name in names}
    return {"norm": norm, **own, **normed, "mixer.dt_bias": f"{inside}.dt_proj.bias"}


def steps(limit: Any) -> dict[str, Any]:
    """Between which two numbers a `time_step_limit` holds the steps."""
    least, most = limit or (0.0, math.inf)
    return ({"dt_min": float(least)} if least else {}) | ({} if most == math.inf else {"dt_max": float(most)})


def time_step_limit(layer: Mamba2) -> tuple[float, float]:
    return layer.dt_min, math.inf if layer.dt_max is None else layer.dt_max


def _design(f: Fields, letter: str, layer: Layer) -> ModelConfig:
    f.must(hidden_act=SILU)
    f.carried("residual_in_fp32", *STARTS)
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=f["hidden_size"],
        pattern=pattern([letter] * f["num_hidden_layers"]),
        layers={letter: layer},
        norm=RMSNorm(eps=f["layer_norm_epsilon"]),
        tie_embeddings=f["tie_word_embeddings"],
    )


def _config(design: ModelConfig, layer: Mamba | Mamba2) -> dict[str, Any]:
    return {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(design.slots),
        "layer_norm_epsilon": design.norm.eps,
        "tie_word_embeddings": design.tied,
        "state_size": layer.state_dim,
        "expand": layer.inner() // design.dim,
        "conv_kernel": layer.conv_width,
        "use_conv_bias": layer.conv_bias,
        "use_bias": layer.in_bias,
    }


def _mamba(f: Fields) -> ModelConfig:
    f.carried("time_step_scale", "time_step_init_scheme", "use_mambapy", "use_associative_scan", "expand")
    layer = Mamba(
        inner_dim=f["intermediate_size"],
        state_dim=f["state_size"],
        dt_rank=f["time_step_rank"],
        conv_width=f["conv_kernel"],
        conv_bias=f["use_conv_bias"],
        in_bias=f["use_bias"],
        out_bias=f["use_bias"],
    )
    return _design(f, "Ma", layer)


def _mamba_config(design: ModelConfig) -> dict[str, Any]:
    layer = first(design, Mamba, "mamba")
    return _config(design, layer) | {"time_step_rank": layer.dt_rank}


def _mamba2(f: Fields) -> ModelConfig:
    f.carried("time_step_rank", "chunk_size", "expand")
    layer = Mamba2(
        heads=f["num_heads"],
        head_dim=f["head_dim"],
        state_dim=f["state_size"],
        groups=f["n_groups"],
        conv_width=f["conv_kernel"],
        conv_bias=f["use_conv_bias"],
        in_bias=f["use_bias"],
        out_bias=f["use_bias"],
        **steps(f["time_step_limit"]),
    )
    return _design(f, "M", layer)


def _mamba2_config(design: ModelConfig) -> dict[str, Any]:
    layer = first(design, Mamba2, "mamba2")
    own = {"num_heads": layer.heads, "head_dim": layer.head_dim, "n_groups": layer.groups}
    return _config(design, layer) | own | {"time_step_limit": time_step_limit(layer)}


def _tiny(draw: Random) -> dict[str, Any]:
    return {
        "vocab_size": 97,
        "num_hidden_layers": draw.choice([2, 3]),
        "layer_norm_epsilon": draw.choice([1e-5, 1e-6]),
        "tie_word_embeddings": draw.random() < 0.5,
        "state_size": draw.choice([5, 8]),
        "conv_kernel": draw.choice([2, 4]),
        "use_conv_bias": draw.random() < 0.5,
        "use_bias": draw.random() < 0.5,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _tiny_mamba(draw: Random) -> dict[str, Any]:
    sizes = {"hidden_size": draw.choice([24, 36]), "expand": draw.choice([1, 2])}
    return _tiny(draw) | sizes | {"time_step_rank": draw.choice(["auto", 5])}


def _tiny_mamba2(draw: Random) -> dict[str, Any]:
    (heads, groups, head_dim), expand = mamba2_sizes(draw), draw.choice([1, 2])
    return _tiny(draw) | {
        "hidden_size": heads * head_dim // expand,
        "num_heads": heads,
        "head_dim": head_dim,
        "n_groups": groups,
        "expand": expand,
        "chunk_size": draw.choice([16, 256]),
        "time_step_limit": draw.choice([(0.0, math.inf), (0.01, math.inf), (0.5, 0.8)]),
    }


FAMILIES = (
    Family(
        model_type="mamba",
        architecture="MambaForCausalLM",
        design=_mamba,
        config=_mamba_config,
        slots=blocks(mamba_rules("norm", "mixer"), inside="backbone.layers.{}."),
        tiny=_tiny_mamba,
        holds=(Mamba,),
        ends=ENDS,
    ),
    Family(
        model_type="mamba2",
        architecture="Mamba2ForCausalLM",
        design=_mamba2,
        config=_mamba2_config,
        slots=blocks(mamba2_rules("norm", "mixer"), inside="backbone.layers.{}."),
        tiny=_tiny_mamba2,
        holds=(Mamba2,),
        ends=ENDS,
    ),
)
