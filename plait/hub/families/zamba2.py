"""Zamba2: Mamba-2 throughout, and shared transformer blocks.

Before some of the layers a block reads the stream beside the embeddings. What it gives goes through a matrix of this use's own
into that layer's input, and not into the stream.
"""

from collections.abc import Iterator
from random import Random
from typing import Any

from plait.design.layers import GEGLU, Attention, Linear, Mamba2
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.design.places import Place, layers
from plait.design.wrap import Wrap
from plait.hub.families.family import ENDS, Family, Named, first, pattern
from plait.hub.families.fields import Fields, rope, rope_parameters
from plait.hub.families.mamba import mamba2_rules
from plait.hub.families.tiny import transformer
from plait.hub.weight_table import Rules

EPS = 1e-5  # of Mamba-2's inner norm, whatever the config says of the others
MAMBA = mamba2_rules("input_layernorm", "mamba")
DERIVED = (  # by the config itself, from its other fields
    *("attention_hidden_size", "attention_head_dim", "kv_channels", "num_query_groups"),
    *("num_hidden_layers", "mamba_headdim"),
)
HOW = ("chunk_size", "use_mamba_kernels", "use_mem_eff_path", "use_long_context", "num_logits_to_keep", "use_conv_bias")
STARTS = ("time_step_max", "time_step_floor")


def _attention(use: int) -> Rules:
    adapters = {
        f"mixer.qkv_proj.adapter_{name}": f"self_attn.linear_{{part}}_adapter_list.{use}.{i}.weight"
        for i, name in enumerate(("down", "up"))
    }
    return {
        "norm": "input_layernorm",
        **adapters,
        "mixer.qkv_proj": "self_attn.{part}_proj",
        "mixer.o_proj": "self_attn.o_proj",
    }


def _geglu(use: int) -> Rules:
    return {
        "norm": "pre_ff_layernorm",
        "mixer.up_proj": "feed_forward.gate_up_proj",
        "mixer.up_proj.adapter_down": f"feed_forward.gate_up_proj_adapter_list.{use}.0.weight",
        "mixer.up_proj.adapter_up": f"feed_forward.gate_up_proj_adapter_list.{use}.1.weight",
        "mixer.down_proj": "feed_forward.down_proj",
    }


def _slots(design: ModelConfig) -> Iterator[Named]:
    """A block's weights, norms among them, lie where it is used for the first time."""
    index, use, uses, places = -1, -1, {}, list(layers(design.slots))
    for i, place in enumerate(places):
        layer, ours = place.layer, f"slots.{i}."
        if isinstance(layer, Attention):
            index, use = index + 1, use + 1
        elif isinstance(layer, Mamba2) and not _fed(places, i):
            index += 1
        if isinstance(layer, Attention | GEGLU):
            first_use = uses.setdefault(place.letter, index)
            rules = _attention(use) if isinstance(layer, Attention) else _geglu(use)
            yield Named(ours, f"model.layers.{first_use}.shared_transformer.", rules)
        elif isinstance(layer, Linear):
            yield Named(ours, f"model.layers.{index}.", {"mixer.proj": "linear"})
        else:
            yield Named(ours, f"model.layers.{index}.{'mamba_decoder.' if _fed(places, i) else ''}", MAMBA)


def _fed(places: list[Place], i: int) -> bool:
    """Whether a shared block stands before it."""
    return i > 0 and isinstance(places[i - 1].layer, Linear)


def _letters(block: int, count: int) -> tuple[str, str]:
    """Of a block's attention and feed-forward layer."""
    which = "" if count == 1 else chr(ord("a") + block)
    return f"A{which}", f"F{which}"


def _design(f: Fields) -> ModelConfig:
    # without tied embeddings transformers' class does not share the blocks either
    f.must(rms_norm_eps=EPS, tie_word_embeddings=True)
    f.carried(*DERIVED, *HOW, *STARTS)
    blocks, use, letters = f["num_mem_blocks"], 0, []
    kinds: dict[str, Any] = {"M": _mamba2(f), "P": Linear(wrap=Wrap(norms="none", gives="next_added"))}
    attention, geglu = _attention_layer(f), _geglu_layer(f)
    hybrids = f.each_of("layers_block_type", {"linear_attention": False, "hybrid": True})
    f.must(hybrid_layer_ids=[i for i, hybrid in enumerate(hybrids) if hybrid])
    for hybrid in hybrids:
        if hybrid:
            a, b = _letters(use % blocks, blocks)
            kinds |= {a: attention, b: geglu}
            letters += [a, b, "P"]
            use += 1
        letters.append("M")
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=f["hidden_size"],
        pattern=pattern(letters),
        layers={letter: layer for letter, layer in kinds.items() if letter in letters},
        norm=RMSNorm(eps=EPS),
    )


def _attention_layer(f: Fields) -> Attention:
    heads = f["num_attention_heads"]
    size = 2 * f["hidden_size"] // heads
    turned = rope(f) if f["use_mem_rope"] else f.carried("rope_parameters")
    own = {"adapter_rank": f["adapter_rank"], "adapted": ("q", "k", "v")} if f["use_shared_attention_adapter"] else {}
    return Attention(
        heads=heads,
        kv_heads=f["num_key_value_heads"],
        head_dim=size,
        rope=turned,
        scale=(size / 2) ** -0.5,
        shared=True,
        wrap=Wrap(reads="stream_and_embeddings", gives="next"),
        **own,
    )


def _geglu_layer(f: Fields) -> GEGLU:
    return GEGLU(
        hidden=f["intermediate_size"],
        bias=f["add_bias_linear"],
        exact=f.one_of("hidden_act", {"gelu": True, "gelu_pytorch_tanh": False}),
        shared=True,
        adapter_rank=f["adapter_rank"],
        adapted=("up_proj",),
        wrap=Wrap(gives="next"),
    )


def _mamba2(f: Fields) -> Mamba2:
    heads = f["n_mamba_heads"]
    return Mamba2(
        heads=heads,
        head_dim=int(f["mamba_expand"] * f["hidden_size"]) // heads,
        state_dim=f["mamba_d_state"],
        groups=f["mamba_ngroups"],
        conv_width=f["mamba_d_conv"],
        in_bias=f["add_bias_linear"],
        out_bias=f["add_bias_linear"],
        dt_min=f["time_step_min"],
    )


def _config(design: ModelConfig) -> dict[str, Any]:
    m, a = first(design, Mamba2, "zamba2"), first(design, Attention, "zamba2")
    f = first(design, GEGLU, "zamba2")
    places = list(layers(design.slots))
    mixers = [i for i, place in enumerate(places) if isinstance(place.layer, Mamba2)]
    blocks = {place.letter for place in places if isinstance(place.layer, Attention)}
    hybrids = [_fed(places, i) for i in mixers]
    return {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(mixers),
        "layers_block_type": ["hybrid" if hybrid else "linear_attention" for hybrid in hybrids],
        "hybrid_layer_ids": [i for i, hybrid in enumerate(hybrids) if hybrid],
        "num_mem_blocks": len(blocks),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "use_mem_rope": a.rope is not None,
        **({} if a.rope is None else {"rope_parameters": rope_parameters(a.rope)}),
        "use_shared_attention_adapter": a.adapter_rank is not None,
        "adapter_rank": f.adapter_rank,
        "intermediate_size": f.hidden,
        "hidden_act": "gelu" if f.exact else "gelu_pytorch_tanh",
        "add_bias_linear": f.bias,
        "n_mamba_heads": m.heads,
        "mamba_expand": m.inner() // design.dim,
        "mamba_d_state": m.state_dim,
        "mamba_ngroups": m.groups,
        "mamba_d_conv": m.conv_width,
        "time_step_min": m.dt_min,
        "tie_word_embeddings": design.tied,
    }


def _tiny(draw: Random) -> dict[str, Any]:
    config = transformer(draw, head_dim=False) | {"rms_norm_eps": EPS, "tie_word_embeddings": True}
    adapted, groups = draw.random() < 0.5, draw.choice([1, 2])
    heads = config["num_attention_heads"]
    kinds = ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"][draw.choice([0, 1]) :]
    return config | {
        "num_key_value_heads": heads if adapted else config["num_key_value_heads"],  # which is all that theirs adapts
        "layers_block_type": kinds,
        "num_hidden_layers": len(kinds),
        "num_mem_blocks": draw.choice([1, 2]),
        "use_shared_attention_adapter": adapted,
        "adapter_rank": draw.choice([3, 5]),
        "use_mem_rope": draw.random() < 0.5,
        "add_bias_linear": draw.random() < 0.5,
        "hidden_act": draw.choice(["gelu", "gelu_pytorch_tanh"]),
        "mamba_expand": 2,
        "n_mamba_heads": groups * draw.choice([1, 2]) if config["hidden_size"] % 2 == 0 else 2,
        "mamba_ngroups": groups,
        "mamba_d_state": draw.choice([5, 8]),
        "mamba_d_conv": draw.choice([4, 2]),
        "chunk_size": draw.choice([256, 16]),
        "time_step_min": draw.choice([0.001, 0.3]),
    }


FAMILIES = (
    Family(
        model_type="zamba2",
        architecture="Zamba2ForCausalLM",
        design=_design,
        config=_config,
        slots=_slots,
        tiny=_tiny,
        holds=(Mamba2, Attention, GEGLU, Linear),
        ends={**ENDS, "norm": "model.final_layernorm"},
    ),
)
