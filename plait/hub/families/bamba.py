"""Bamba and Granite 4's hybrids: Mamba-2 or attention, and a SwiGLU or experts after each."""

import math
from collections.abc import Callable
from random import Random
from typing import Any

from plait.design.ends import Logits, Tokens
from plait.design.layers import Attention, Layer, Mamba2, MixtureOfExperts, SwiGLU
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.design.wrap import Wrap
from plait.hub.families.family import ENDS, Family, all_of, by_kind, first, pattern
from plait.hub.families.fields import Fields, rope_parameters
from plait.hub.families.llama import ATTENTION, FULL, SWIGLU, attention, swiglu
from plait.hub.families.mamba import SILU, mamba2_rules, steps, time_step_limit
from plait.hub.families.tiny import transformer

LINEAR = "linear_attention"
MAMBA = mamba2_rules("input_layernorm", "mamba")
BAMBA = {
    Mamba2: MAMBA,
    Attention: ATTENTION,
    SwiGLU: {
        "norm": "pre_ff_layernorm",
        "mixer.up_proj": "feed_forward.{part}_proj",
        "mixer.down_proj": "feed_forward.down_proj",
    },
}
GRANITE = {
    Mamba2: MAMBA,
    Attention: ATTENTION,
    SwiGLU: {
        "norm": SWIGLU["norm"],
        "mixer.up_proj": "shared_mlp.input_linear",
        "mixer.down_proj": "shared_mlp.output_linear",
    },
    MixtureOfExperts: {
        "norm": SWIGLU["norm"],
        "mixer.router": "block_sparse_moe.router.layer.weight",
        "mixer.experts_up": "block_sparse_moe.input_linear.weight",
        "mixer.experts_down": "block_sparse_moe.output_linear.weight",
        "mixer.shared_up_proj": "shared_mlp.input_linear",
        "mixer.shared_down_proj": "shared_mlp.output_linear",
    },
}


# where theirs and ours say the same under two names
MAMBA2 = {
    "heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "state_dim": "mamba_d_state",
    "groups": "mamba_n_groups",
    "conv_width": "mamba_d_conv",
    "conv_bias": "mamba_conv_bias",
    "in_bias": "mamba_proj_bias",
    "out_bias": "mamba_proj_bias",
}
OF_ATTENTION = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rope_parameters"),
    *("attention_multiplier", "position_embedding_type"),
)


def hybrid_design(
    f: Fields, full: list[bool], a: Callable[[Fields], Attention], after: Layer, **more: Any
) -> ModelConfig:
    """`full` says of each block whether it is of attention; `after` is the channel mixer of all. Of a mixer that no block has,
    the fields say nothing."""
    f.must(hidden_act=SILU)
    f.carried(
        "mamba_chunk_size", "mamba_expand", "time_step_limit", "num_hidden_layers", *MAMBA2.values(), *OF_ATTENTION
    )
    last = "E" if isinstance(after, MixtureOfExperts) else "F"
    bound = {last: after}
    if not all(full):
        bound["M"] = Mamba2(**{ours: f[theirs] for ours, theirs in MAMBA2.items()}, **steps(f.get("time_step_limit")))
    if any(full):
        bound["A"] = a(f)
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=f["hidden_size"],
        pattern=pattern(letter for here in full for letter in ("A" if here else "M", last)),
        layers=bound,
        norm=RMSNorm(eps=f["rms_norm_eps"]),
        tie_embeddings=f["tie_word_embeddings"],
        **more,
    )


def hybrid_config(design: ModelConfig) -> dict[str, Any]:
    """The fields of ends, attention and Mamba-2; of a kind that the design has none of, none."""
    given: dict[str, Any] = {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(design.slots) // 2,
        "rms_norm_eps": design.norm.eps,
        "tie_word_embeddings": design.tied,
    }
    for a in all_of(design, Attention)[:1]:
        given |= {"num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "attention_bias": a.bias}
        given |= {"head_dim": a.head_dim} if a.heads * a.head_dim != design.dim else {}
        given |= {"rope_parameters": rope_parameters(a.rope)} if a.rope else {}
    mamba2 = all_of(design, Mamba2)[:1]
    for m in mamba2:
        given |= {theirs: getattr(m, ours) for ours, theirs in MAMBA2.items()}
        given |= {"mamba_expand": m.inner() // design.dim, "time_step_limit": time_step_limit(m)}
    if not mamba2:
        given |= {"mamba_n_heads": 1, "mamba_d_head": "auto"}  # they check that these fit all the same
    return given


def full(design: ModelConfig) -> list[int]:
    """The blocks of attention, by number."""
    return [i // 2 for i, slot in enumerate(design.slots) if isinstance(slot.layer, Attention)]  # type: ignore[union-attr]  # no parallel slot passes `holds`


def _bamba(f: Fields) -> ModelConfig:
    f.carried("num_logits_to_keep", "z_loss_coefficient")
    indices = f.get("attn_layer_indices", ())
    at = [i in indices for i in range(f["num_hidden_layers"])]
    return hybrid_design(f, at, lambda f: attention(f, partial=True, bias=f["attention_bias"]), swiglu(f))


def _bamba_config(design: ModelConfig) -> dict[str, Any]:
    f = first(design, SwiGLU, "bamba")
    own = {"attn_layer_indices": full(design) or None, "intermediate_size": f.hidden, "mlp_bias": f.bias}
    return hybrid_config(design) | own


def _granite(f: Fields) -> ModelConfig:
    f.carried("output_router_logits", "router_aux_loss_coef")
    return hybrid_design(
        f,
        [kind == FULL for kind in f["layer_types"]],
        _granite_attention,
        _granite_after(f),
        front=Tokens(scale=f["embedding_multiplier"]),
        head=Logits(scale=1 / f["logits_scaling"]),
        wrap=Wrap(factor=f["residual_multiplier"]),
    )


def _granite_attention(f: Fields) -> Attention:
    turned = f.one_of("position_embedding_type", {"rope": {}, "nope": {"rope": None}, None: {"rope": None}})
    return attention(f, bias=f["attention_bias"], scale=f["attention_multiplier"], **turned)


def _granite_after(f: Fields) -> Layer:
    """Experts and one that all tokens pass, or that one alone."""
    f.carried("intermediate_size", "num_experts_per_tok")
    shared = f["shared_intermediate_size"]
    if not f["num_local_experts"]:
        return SwiGLU(hidden=shared)
    return MixtureOfExperts(
        experts=f["num_local_experts"],
        top_k=f["num_experts_per_tok"],
        hidden=f["intermediate_size"],
        shared_hidden=shared,
    )


def _granite_config(design: ModelConfig) -> dict[str, Any]:
    kinds = [FULL if i in full(design) else LINEAR for i in range(len(design.slots) // 2)]
    given = hybrid_config(design) | {
        "layer_types": kinds,
        "embedding_multiplier": design.front.scale,
        "logits_scaling": 1 / design.head.scale,
        "residual_multiplier": design.full_wrap.factor,
    }
    for a in all_of(design, Attention)[:1]:
        given |= {"attention_multiplier": a.scale or a.head_dim**-0.5}
        given |= {"position_embedding_type": "rope" if a.rope else "nope"}
    if experts := all_of(design, MixtureOfExperts):
        e = experts[0]
        sizes = {"num_local_experts": e.experts, "num_experts_per_tok": e.top_k, "intermediate_size": e.hidden}
        return given | sizes | {"shared_intermediate_size": e.shared_hidden}
    return given | {
        "num_local_experts": 0,
        "shared_intermediate_size": first(design, SwiGLU, "granitemoehybrid").hidden,
    }


def _tiny(draw: Random) -> dict[str, Any]:
    config = transformer(draw, head_dim=False)
    expand = draw.choice([1, 2])
    inner = expand * config["hidden_size"]
    heads = draw.choice([n for n in range(1, 9) if inner % n == 0])
    return config | {
        "mamba_expand": expand,
        "mamba_n_heads": heads,
        "mamba_n_groups": draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "mamba_d_state": draw.choice([5, 8]),
        "mamba_d_conv": draw.choice([2, 4]),
        "mamba_chunk_size": draw.choice([16, 256]),
        "mamba_conv_bias": draw.random() < 0.5,
        "mamba_proj_bias": draw.random() < 0.5,
        "attention_bias": draw.random() < 0.5,
        "time_step_limit": draw.choice([(0.0, math.inf), (0.01, math.inf), (0.5, 0.8)]),
    }


def _tiny_bamba(draw: Random) -> dict[str, Any]:
    config = _tiny(draw)
    indices = [i for i in range(config["num_hidden_layers"]) if draw.random() < 0.4]
    return config | {"attn_layer_indices": indices or draw.choice([None, []]), "mlp_bias": draw.random() < 0.5}


def _tiny_granite(draw: Random) -> dict[str, Any]:
    config = _tiny(draw)
    experts = {"num_local_experts": draw.choice([0, 3, 4]), "num_experts_per_tok": draw.choice([1, 2])}
    multipliers = {"attention_multiplier": 0.3, "embedding_multiplier": 6.0, "logits_scaling": 4.0}
    return (
        config
        | experts
        | multipliers
        | {
            "layer_types": [draw.choice([FULL, LINEAR]) for _ in range(config["num_hidden_layers"])],
            "position_embedding_type": draw.choice(["rope", "nope", None]),
            "residual_multiplier": draw.choice([0.22, 1.0]),
            "shared_intermediate_size": draw.choice([24, 36]),
        }
    )


FAMILIES = (
    Family(
        model_type="bamba",
        architecture="BambaForCausalLM",
        design=_bamba,
        config=_bamba_config,
        slots=by_kind(BAMBA, per=2),
        tiny=_tiny_bamba,
        holds=(Mamba2, Attention, SwiGLU),
        ends=ENDS | {"norm": "model.final_layernorm"},
        alike=(("attn_layer_indices",), ("mamba_n_heads", "mamba_d_head")),
        aliases=(r".*rotary_emb\.inv_freq",),
    ),
    Family(
        model_type="granitemoehybrid",
        architecture="GraniteMoeHybridForCausalLM",
        design=_granite,
        config=_granite_config,
        slots=by_kind(GRANITE, per=2),
        tiny=_tiny_granite,
        holds=(Mamba2, Attention, SwiGLU, MixtureOfExperts),
        alike=(("position_embedding_type",), ("mamba_n_heads", "mamba_d_head")),
        aliases=(r".*rotary_emb\.inv_freq",),
    ),
)
