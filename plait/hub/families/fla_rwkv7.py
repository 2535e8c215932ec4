"""RWKV-7 in folders of flash-linear-attention."""

from collections.abc import Iterator
from random import Random
from typing import Any

from plait.design.ends import Tokens
from plait.design.layers import RWKV7, RWKV7FeedForward
from plait.design.layers.rwkv7 import SHIFTED
from plait.design.model import ModelConfig
from plait.design.norms import LayerNorm
from plait.design.places import layers
from plait.hub.families.family import Family, Named, first
from plait.hub.families.fields import Fields
from plait.hub.families.fla import COMMON, ENDS, common
from plait.hub.weight_table import Form, Rows, Rules

FUSED_EPS = 1e-6  # in the length of what is removed, where norms are fused
TOKEN = Form(lambda x: x.flatten(), lambda x: x[None, None])
LOW_RANK = {"w": "decay_low_rank_dim", "a": "a_low_rank_dim", "v": "v_low_rank_dim", "g": "gate_low_rank_dim"}
FEED_FORWARD: Rules = {
    "norm": "ffn_norm",
    "mixer.x_k": "ffn.x_k",
    "mixer.up_proj": "ffn.key",
    "mixer.down_proj": "ffn.value",
}
DEFAULTS: dict[str, Any] = {name: value for name, value in COMMON.items() if name != "conv_size"} | {
    "head_dim": 64,
    "num_heads": None,
    "value_dim": None,
    "decay_low_rank_dim": 64,
    "gate_low_rank_dim": 128,
    "a_low_rank_dim": 64,
    "v_low_rank_dim": 16,
    "hidden_act": "sqrelu",
    "norm_first": True,
    "norm_bias": True,
    "norm_eps": 1e-5,
}


def mixer(layer: RWKV7) -> Rules:
    heads = Form(lambda x: x.flatten(), lambda x: x.view(layer.heads, -1))
    return {
        "norm": "attn_norm",
        **{f"mixer.x_{name}": Rows(f"attn.x_{name}", form=TOKEN) for name in SHIFTED},
        **{f"mixer.{name}_proj": f"attn.{name}_proj" for name in "rkv"},
        **{f"mixer.{name}_down": f"attn.{name}_lora.lora.0" for name in LOW_RANK},
        **{f"mixer.{name}_up": f"attn.{name}_lora.lora.2" for name in LOW_RANK},
        **{f"mixer.{name}0": f"attn.{name}_lora.lora.2.bias" for name in "wav"},
        "mixer.k_k": "attn.k_k",
        "mixer.k_a": "attn.k_a",
        "mixer.r_k": Rows("attn.r_k", form=heads),
        "mixer.norm": "attn.g_norm",
        "mixer.out_proj": "attn.o_proj",
    }


def _slots(design: ModelConfig) -> Iterator[Named]:
    for i, place in enumerate(layers(design.slots)):
        rules = mixer(place.layer) if isinstance(place.layer, RWKV7) else FEED_FORWARD
        yield Named(f"slots.{i}.", f"model.layers.{i // 2}.", rules)


def _design(f: Fields) -> ModelConfig:
    common(f)
    f.must(hidden_act="sqrelu")
    dim, count, eps = f["hidden_size"], f["num_hidden_layers"], f["norm_eps"]
    f.must(value_dim=(None, dim, [dim] * count))
    head_dim = f.get("head_dim") or dim // f["num_heads"]
    f.must(num_heads=(None, dim // head_dim))
    hidden = f.get("intermediate_size")
    if hidden is None:
        hidden = -(-int(dim * (f["hidden_ratio"] or 4)) // 32) * 32
    f.carried("hidden_ratio")
    ranks = {"decay_rank": "w", "strength_rank": "a", "value_rank": "v", "gate_rank": "g"}
    time = RWKV7(
        heads=dim // head_dim,
        head_dim=head_dim,
        norm_eps=head_dim * eps,
        removal_eps=FUSED_EPS if f["fuse_norm"] else None,
        **{ours: f[LOW_RANK[name]] for ours, name in ranks.items()},
    )
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=dim,
        pattern=f"(TC){count}",
        layers={"T": time, "C": RWKV7FeedForward(hidden=hidden)},
        at={"T#0": {"value_residual": False}},
        norm=LayerNorm(eps=eps, bias=f["norm_bias"]),
        front=Tokens(norm=f["norm_first"]),
        tie_embeddings=f["tie_word_embeddings"],
    )


def _config(design: ModelConfig) -> dict[str, Any]:
    t = first(design, RWKV7, "rwkv7")
    return {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(design.slots) // 2,
        "head_dim": t.head_dim,
        "intermediate_size": first(design, RWKV7FeedForward, "rwkv7").hidden,
        "decay_low_rank_dim": t.decay_rank,
        "a_low_rank_dim": t.strength_rank,
        "gate_low_rank_dim": t.gate_rank,
        "v_low_rank_dim": _value_rank(design),
        "fuse_norm": t.removal_eps is not None,
        "norm_first": design.front.norm,
        "norm_bias": getattr(design.norm, "bias", True),
        "norm_eps": design.norm.eps,
        "tie_word_embeddings": design.tied,
    }


def _value_rank(design: ModelConfig) -> int | None:
    """Of the second layer on: the first one's values are mixed with nothing."""
    ranks = (x.layer.value_rank for x in layers(design.slots) if isinstance(x.layer, RWKV7) and x.layer.value_residual)
    return next(ranks, first(design, RWKV7, "rwkv7").value_rank)


def _tiny(draw: Random) -> dict[str, Any]:
    heads, head_dim = draw.choice([(1, 16), (2, 8), (3, 8)])
    return {
        "vocab_size": 37,
        "hidden_size": heads * head_dim,
        "num_hidden_layers": draw.choice([2, 3]),
        "head_dim": head_dim,
        "intermediate_size": draw.choice([None, 40]),
        "decay_low_rank_dim": 5,
        "gate_low_rank_dim": 7,
        "a_low_rank_dim": 6,
        "v_low_rank_dim": 4,
        "fuse_norm": draw.random() < 0.5,
        "norm_first": draw.random() < 0.7,
        "norm_bias": draw.random() < 0.7,
        "norm_eps": draw.choice([1e-5, 1e-6]),
        "tie_word_embeddings": draw.random() < 0.5,
    }


FAMILIES = (
    Family(
        model_type="rwkv7",
        architecture="RWKV7ForCausalLM",
        design=_design,
        config=_config,
        slots=_slots,
        tiny=_tiny,
        holds=(RWKV7, RWKV7FeedForward),
        ends={**ENDS, "embed_norm": "model.layers.0.pre_norm"},
        defaults=DEFAULTS,
        alike=(("intermediate_size",), ("v_low_rank_dim",)),
    ),
)
