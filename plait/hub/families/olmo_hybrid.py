"""OLMo Hybrid: gated DeltaNet with norms before it, attention with norms behind it, as each does alone."""

from collections.abc import Iterator
from random import Random
from typing import Any

from plait.design.layers import Attention, GatedDeltaNet, SwiGLU
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.design.places import Place, layers
from plait.design.wrap import Wrap
from plait.hub.families.family import Family, Named, first, pattern
from plait.hub.families.fields import Fields, rope, rope_parameters
from plait.hub.families.llama import ATTENTION, FULL, attention, swiglu
from plait.hub.families.qwen_hybrid import LINEAR
from plait.hub.families.tiny import transformer
from plait.hub.weight_table import Either, Rows, Rules

HEADS_EPS = 1e-5  # of the heads' norm behind gated DeltaNet, whatever the config says of the others
AFTER = Wrap(norms="after")
UNTURNED = {"rope_type": "default", "rope_theta": None}
MLP = {"mixer.up_proj": "mlp.{part}_proj", "mixer.down_proj": "mlp.down_proj"}
# Norms have the first names in the published files. transformers gives the one behind attention the name that the one before
# a feed-forward layer has.
BEHIND: Rules = {
    **{path: rule for path, rule in ATTENTION.items() if path != "norm"},
    "after": Either(("post_attention_layernorm", "feedforward_layer_norm")),
}
MLP_BEHIND: Rules = {**MLP, "after": "post_feedforward_layernorm"}
MLP_BEFORE: Rules = {**MLP, "norm": Either(("feedforward_layer_norm", "post_attention_layernorm"))}
DELTA: Rules = {
    "norm": Either(("attention_layer_norm", "input_layernorm")),
    "mixer.in_proj": (
        *(Rows(f"linear_attn.{part}_proj", (part,)) for part in "qkvba"),
        Rows("linear_attn.g_proj", ("z",)),
    ),
    # transformers cuts what it writes into three equal parts, whatever the heads' sizes
    "mixer.conv1d": Either(
        ("linear_attn.{part}_conv1d", tuple(Rows(f"linear_attn.{x}_conv1d", chunk=(i, 3)) for i, x in enumerate("qkv")))
    ),
    "mixer.A_log": "linear_attn.A_log",
    "mixer.dt_bias": "linear_attn.dt_bias",
    "mixer.norm": "linear_attn.o_norm",
    "mixer.out_proj": "linear_attn.o_proj",
}
START = ("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")


def _rules(place: Place) -> Rules:
    if isinstance(place.layer, SwiGLU):
        return MLP_BEHIND if place.wrap.after else MLP_BEFORE
    return DELTA if isinstance(place.layer, GatedDeltaNet) else BEHIND


def _slots(design: ModelConfig) -> Iterator[Named]:
    for i, place in enumerate(layers(design.slots)):
        yield Named(f"slots.{i}.", f"model.layers.{i // 2}.", _rules(place))


def _design(f: Fields) -> ModelConfig:
    f.must(linear_use_gate=True)
    f.carried("num_hidden_layers", *START)
    given = f["rope_parameters"] or UNTURNED
    turned = None if given.get("rope_theta") is None else rope(f)
    a = attention(f, bias=f["attention_bias"], qk_norm="wide", rope=turned, wrap=AFTER)
    mlp = swiglu(f)
    d = GatedDeltaNet(
        heads=f["linear_num_key_heads"],
        head_dim=f["linear_key_head_dim"],
        value_heads=f["linear_num_value_heads"],
        value_head_dim=f["linear_value_head_dim"],
        conv_width=f["linear_conv_kernel_dim"],
        negative_eigenvalues=f["linear_allow_neg_eigval"],
        norm_eps=None if f["rms_norm_eps"] == HEADS_EPS else HEADS_EPS,
    )
    kinds = {FULL: "A P", LINEAR: "D F"}
    blocks = [Fields({"layer_types": kind}, f.where).one_of("layer_types", kinds) for kind in f["layer_types"]]
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=f["hidden_size"],
        pattern=pattern(" ".join(blocks).split()),
        layers={"A": a, "P": mlp.replace(wrap=AFTER), "D": d, "F": mlp},
        norm=RMSNorm(eps=f["rms_norm_eps"]),
        tie_embeddings=f["tie_word_embeddings"],
    )


def _config(design: ModelConfig) -> dict[str, Any]:
    a, d = first(design, Attention, "olmo_hybrid"), first(design, GatedDeltaNet, "olmo_hybrid")
    mixers = [place.layer for place in layers(design.slots)][::2]
    return {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(mixers),
        "layer_types": [FULL if isinstance(layer, Attention) else LINEAR for layer in mixers],
        "intermediate_size": first(design, SwiGLU, "olmo_hybrid").hidden,
        "rms_norm_eps": design.norm.eps,
        "tie_word_embeddings": design.tied,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "attention_bias": a.bias is True,
        "rope_parameters": UNTURNED if a.rope is None else rope_parameters(a.rope),
        "linear_num_key_heads": d.heads,
        "linear_key_head_dim": d.head_dim,
        "linear_num_value_heads": d.value_heads,
        "linear_value_head_dim": d.value_head_dim,
        "linear_conv_kernel_dim": d.conv_width,
        "linear_allow_neg_eigval": d.negative_eigenvalues,
    }


def _tiny(draw: Random) -> dict[str, Any]:
    heads = draw.choice([1, 2, 3])
    more = [draw.choice([FULL, LINEAR]) for _ in range(draw.choice([0, 1, 2]))]
    turned = {"rope_type": "default", "rope_theta": draw.choice([None, 1e4, 5e5])}
    return transformer(draw, head_dim=False) | {
        "num_hidden_layers": 2 + len(more),
        "layer_types": [LINEAR, FULL, *more] if draw.random() < 0.5 else [FULL, *more, LINEAR],
        "rope_parameters": turned,
        "attention_bias": draw.random() < 0.3,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads * draw.choice([1, 2]),
        "linear_key_head_dim": draw.choice([6, 8]),
        "linear_value_head_dim": draw.choice([5, 12]),
        "linear_conv_kernel_dim": draw.choice([3, 4]),
        "linear_allow_neg_eigval": draw.random() < 0.6,
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
    }


FAMILIES = (
    Family(
        model_type="olmo_hybrid",
        architecture="OlmoHybridForCausalLM",
        design=_design,
        config=_config,
        slots=_slots,
        tiny=_tiny,
        holds=(Attention, GatedDeltaNet, SwiGLU),
    ),
)
