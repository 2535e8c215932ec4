"""Jamba: Mamba-1 with norms inside, attention without positions at a period, experts at another."""

from collections.abc import Sequence
from random import Random
from typing import Any

from plait.design.layers import Attention, Mamba, MixtureOfExperts, SwiGLU
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.hub.families.bamba import BAMBA
from plait.hub.families.family import ENDS, Family, all_of, by_kind, pattern
from plait.hub.families.fields import Fields
from plait.hub.families.llama import ATTENTION, attention, swiglu
from plait.hub.families.mamba import mamba_rules
from plait.hub.families.tiny import transformer

RULES = {
    Mamba: mamba_rules("input_layernorm", "mamba"),
    Attention: ATTENTION,
    SwiGLU: BAMBA[SwiGLU],
    MixtureOfExperts: {
        "norm": "pre_ff_layernorm",
        "mixer.router": "feed_forward.router.weight",
        "mixer.experts_up": "feed_forward.experts.{expert}.{part}_proj.weight",
        "mixer.experts_down": "feed_forward.experts.{expert}.down_proj.weight",
    },
}
ATTENTION_AT, EXPERTS_AT = ("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset")


def _at(f: Fields, names: tuple[str, str]) -> list[bool]:
    """Which blocks a period and an offset name."""
    period, offset = (f[name] for name in names)
    return [i % period == offset for i in range(f["num_hidden_layers"])]


def _period(names: tuple[str, str], blocks: Sequence[bool]) -> dict[str, int]:
    """The other way round, as the first two of the blocks say it; that the others do, too, is seen when it is read again."""
    count, chosen = len(blocks), [i for i, block in enumerate(blocks) if block]
    offset = chosen[0] if chosen else count
    period = chosen[1] - chosen[0] if len(chosen) > 1 else count
    return dict(zip(names, (max(period, offset + 1), offset), strict=True))


def _mamba(f: Fields) -> Mamba:
    return Mamba(
        inner_dim=f["mamba_expand"] * f["hidden_size"],
        state_dim=f["mamba_d_state"],
        dt_rank=f["mamba_dt_rank"],
        conv_width=f["mamba_d_conv"],
        conv_bias=f["mamba_conv_bias"],
        in_bias=f["mamba_proj_bias"],
        out_bias=f["mamba_proj_bias"],
        norms=True,
    )


def _experts(f: Fields) -> MixtureOfExperts:
    sizes = {"experts": f["num_experts"], "top_k": f["num_experts_per_tok"], "hidden": f["intermediate_size"]}
    return MixtureOfExperts(**sizes, renormalize=False)


def _design(f: Fields) -> ModelConfig:
    f.carried(
        "use_mamba_kernels", "use_mambapy", "use_associative_scan", "output_router_logits", "router_aux_loss_coef"
    )
    f.carried("num_experts_per_tok")
    full, experts = _at(f, ATTENTION_AT), _at(f, EXPERTS_AT)
    letters = [x for a, e in zip(full, experts, strict=True) for x in ("A" if a else "Ma", "E" if e else "F")]
    if f["num_experts"] == 1:
        letters = [letter.replace("E", "F") for letter in letters]
    f.carried("num_attention_heads", "num_key_value_heads", "head_dim")
    bound = {"Ma": _mamba(f), "F": swiglu(f)}
    bound |= {"A": attention(f, rope=None)} if "A" in letters else {}
    bound |= {"E": _experts(f)} if "E" in letters else {}
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=f["hidden_size"],
        pattern=pattern(letters),
        layers={letter: layer for letter, layer in bound.items() if letter in letters},
        norm=RMSNorm(eps=f["rms_norm_eps"]),
        tie_embeddings=f["tie_word_embeddings"],
    )


def _config(design: ModelConfig) -> dict[str, Any]:
    kinds = [type(slot.layer) for slot in design.slots]  # type: ignore[union-attr]  # no parallel slot passes `holds`
    given: dict[str, Any] = {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(kinds) // 2,
        "rms_norm_eps": design.norm.eps,
        "tie_word_embeddings": design.tied,
        **_period(ATTENTION_AT, [kind is Attention for kind in kinds[::2]]),
        **_period(EXPERTS_AT, [kind is MixtureOfExperts for kind in kinds[1::2]]),
    }
    for a in all_of(design, Attention)[:1]:
        given |= {"num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads}
        given |= {"head_dim": a.head_dim} if a.heads * a.head_dim != design.dim else {}
    for m in all_of(design, Mamba)[:1]:
        given |= {"mamba_expand": m.inner_dim // design.dim, "mamba_d_state": m.state_dim, "mamba_dt_rank": m.dt_rank}
        given |= {"mamba_d_conv": m.conv_width, "mamba_conv_bias": m.conv_bias, "mamba_proj_bias": m.in_bias}
    for f in all_of(design, SwiGLU)[:1]:
        given |= {"intermediate_size": f.hidden}
    for e in all_of(design, MixtureOfExperts)[:1]:
        given |= {"num_experts": e.experts, "num_experts_per_tok": e.top_k, "intermediate_size": e.hidden}
    return given


def _tiny(draw: Random) -> dict[str, Any]:
    config = transformer(draw, head_dim=False)
    period, experts_period = draw.choice([2, 3, 8]), draw.choice([1, 2, 3])
    return config | {
        "num_hidden_layers": draw.choice([2, 4]),
        "attn_layer_period": period,
        "attn_layer_offset": draw.choice([0, 1, period - 1]),
        "expert_layer_period": experts_period,
        "expert_layer_offset": draw.randrange(experts_period),
        "num_experts": draw.choice([1, 3, 4]),
        "num_experts_per_tok": draw.choice([1, 2]),
        "mamba_expand": draw.choice([1, 2]),
        "mamba_d_state": draw.choice([5, 8]),
        "mamba_dt_rank": draw.choice(["auto", 5]),
        "mamba_d_conv": draw.choice([2, 4]),
        "mamba_conv_bias": draw.random() < 0.5,
        "mamba_proj_bias": draw.random() < 0.5,
    }


FAMILIES = (
    Family(
        model_type="jamba",
        architecture="JambaForCausalLM",
        design=_design,
        config=_config,
        slots=by_kind(RULES, per=2),
        tiny=_tiny,
        holds=(Mamba, Attention, SwiGLU, MixtureOfExperts),
        ends=ENDS | {"norm": "model.final_layernorm"},
        alike=(ATTENTION_AT, EXPERTS_AT),
    ),
)
