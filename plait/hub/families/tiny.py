"""Small configs for the parity laws: sizes that divide nothing evenly but what a family asks for."""

from random import Random
from typing import Any


def transformer(draw: Random, head_dim: bool = True) -> dict[str, Any]:
    """Sizes of a transformer: odd and grouped heads, heads that are not side by side as wide as the model, tied or not."""
    kv_heads, group = draw.choice([(1, 3), (2, 2), (3, 1), (1, 1), (2, 3)])
    size = draw.choice([8, 12, 16])
    heads = kv_heads * group
    free = head_dim and draw.random() < 0.5
    return {
        "vocab_size": 97,
        "hidden_size": heads * (draw.choice([8, 20]) if free else size),
        "num_hidden_layers": draw.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": draw.choice([56, 72]),
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "tie_word_embeddings": draw.random() < 0.5,
        "max_position_embeddings": 128,
        **({"head_dim": size} if free else {}),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def mamba2_sizes(draw: Random) -> tuple[int, int, int]:
    """Heads of Mamba-2, groups that divide them, and how wide a head is."""
    groups, each = draw.choice([(1, 3), (2, 2), (3, 1), (1, 1), (2, 3)])
    return groups * each, groups, draw.choice([8, 12])
