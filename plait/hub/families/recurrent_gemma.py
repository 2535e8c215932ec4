"""RecurrentGemma: RG-LRUs, and attention in a window in every third block."""

from collections.abc import Iterator
from random import Random
from typing import Any

import torch

from plait.design.ends import Logits, Tokens
from plait.design.layers import GEGLU, RGLRU, Attention
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.design.places import layers
from plait.hub.families.family import ENDS, Family, Named, by_kind, first, pattern
from plait.hub.families.fields import Fields, rope_parameters
from plait.hub.families.llama import attention
from plait.hub.families.tiny import transformer
from plait.hub.weight_table import Form, Rows, Rules

LETTER = {"recurrent": "R", "attention": "W"}
ATTENTION = {
    "norm": "temporal_pre_norm",
    "mixer.qkv_proj": "temporal_block.{part}_proj",
    "mixer.o_proj": "temporal_block.o_proj",
}
GEGLU_ = {
    "norm": "channel_pre_norm",
    "mixer.up_proj": "mlp_block.{part}_proj",
    "mixer.down_proj": "mlp_block.down_proj",
}


def _recurrent(heads: int) -> Rules:
    """Their gates are a matrix for each head, inputs first, and a bias for each head; their rates lie in one row."""
    matrix = Form(lambda x: x.mT.contiguous(), lambda x: x.unflatten(0, (heads, -1)).mT.contiguous())
    bias = Form(lambda x: x, lambda x: x.unflatten(0, (heads, -1)))
    gates = {"write": "temporal_block.rg_lru.input_gate", "forget": "temporal_block.rg_lru.recurrent_gate"}
    return {
        "norm": "temporal_pre_norm",
        "mixer.in_proj": (Rows("temporal_block.linear_x", ("x",)), Rows("temporal_block.linear_y", ("gate",))),
        "mixer.conv1d": "temporal_block.conv_1d",
        "mixer.gates.weight": tuple(
            Rows(f"{name}_weight", (part,), groups=heads, both=True, form=matrix) for part, name in gates.items()
        ),
        "mixer.gates.bias": tuple(Rows(f"{name}_bias", (part,), form=bias) for part, name in gates.items()),
        "mixer.Lambda": Rows("temporal_block.rg_lru.recurrent_param", form=Form(lambda x: x, lambda x: x.flatten())),
        "mixer.out_proj": "temporal_block.linear_out",
    }


def _slots(design: ModelConfig) -> Iterator[Named]:
    heads = first(design, RGLRU, "recurrent_gemma").heads
    return by_kind({Attention: ATTENTION, RGLRU: _recurrent(heads), GEGLU: GEGLU_}, per=2)(design)


def embedding_scale(dim: int) -> float:
    """The root of the width, which their model keeps in bfloat16."""
    return torch.tensor(dim**0.5, dtype=torch.bfloat16).item()


def _design(f: Fields) -> ModelConfig:
    f.must(hidden_activation="gelu_pytorch_tanh")
    f.carried("w_init_variance_scale", "final_w_init_variance_scale")
    dim, heads, count = f["hidden_size"], f["num_attention_heads"], f["num_hidden_layers"]
    f.must(head_dim=dim // heads)
    kinds = {
        "W": attention(
            f, partial=True, window=f["attention_window_size"], bias=True if f["attention_bias"] else ("o",)
        ),
        "R": RGLRU(heads=heads, head_dim=f["lru_width"] // heads, conv_width=f["conv1d_width"]),
        "F": GEGLU(hidden=f["intermediate_size"] // 2, bias=True),
    }
    blocks = f.each_of("block_types", LETTER)
    letters = [letter for i in range(count) for letter in (blocks[i % len(blocks)], "F")]
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=dim,
        pattern=pattern(letters),
        layers={letter: layer for letter, layer in kinds.items() if letter in letters},
        norm=RMSNorm(eps=f["rms_norm_eps"], zero_centered=True),
        front=Tokens(scale=embedding_scale(dim)),
        head=Logits(softcap=f["logits_soft_cap"]),
        tie_embeddings=f["tie_word_embeddings"],
    )


def _config(design: ModelConfig) -> dict[str, Any]:
    a, r = first(design, Attention, "recurrent_gemma"), first(design, RGLRU, "recurrent_gemma")
    f = first(design, GEGLU, "recurrent_gemma")
    mixers = [place.layer for place in layers(design.slots) if not isinstance(place.layer, GEGLU)]
    return {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(mixers),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "attention_window_size": a.window,
        "attention_bias": a.bias is True,
        "rope_parameters": None if a.rope is None else rope_parameters(a.rope, partial=True),
        "lru_width": r.inner(),
        "conv1d_width": r.conv_width,
        "intermediate_size": 2 * f.hidden,
        "block_types": ["recurrent" if isinstance(layer, RGLRU) else "attention" for layer in mixers],
        "rms_norm_eps": design.norm.eps,
        "logits_soft_cap": design.head.softcap,
        "tie_word_embeddings": design.tied,
    }


def _tiny(draw: Random) -> dict[str, Any]:
    config = transformer(draw, head_dim=False)
    blocks = draw.choice(
        [["recurrent", "recurrent", "attention"], ["attention", "recurrent"], ["recurrent", "attention"]]
    )
    return config | {
        "num_hidden_layers": draw.choice([3, 4]),
        "block_types": blocks,
        "lru_width": draw.choice([None, config["num_attention_heads"] * 10]),
        "attention_window_size": draw.choice([4, 7, 64]),
        "attention_bias": draw.random() < 0.5,
        "conv1d_width": draw.choice([4, 3]),
        "logits_soft_cap": draw.choice([30.0, 2.0]),
    }


FAMILIES = (
    Family(
        model_type="recurrent_gemma",
        architecture="RecurrentGemmaForCausalLM",
        design=_design,
        config=_config,
        slots=_slots,
        tiny=_tiny,
        holds=(Attention, RGLRU, GEGLU),
        ends={**ENDS, "norm": "model.final_norm"},
    ),
)
