"""MiniMax-01: lightning attention, softmax attention in every eighth block, and experts; each adds to what its norm gives."""

from collections.abc import Iterator
from random import Random
from typing import Any

from plait.design.layers import Attention, LightningAttention, MixtureOfExperts
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.design.places import layers
from plait.design.wrap import Wrap
from plait.hub.families.family import Family, Named, by_kind, first, pattern
from plait.hub.families.fields import Fields, rope, rope_parameters
from plait.hub.families.llama import ATTENTION
from plait.hub.families.tiny import transformer
from plait.hub.weight_table import Rows, Rules

LETTER = {"full_attention": "A", "linear_attention": "Li"}
FACTORS = {"full_attn": Attention, "linear_attn": LightningAttention, "mlp": MixtureOfExperts}
LIGHTNING_EPS = 1e-6  # of the norm inside lightning attention, whatever the config's is
EXPERTS = {
    "norm": "post_attention_layernorm",
    "mixer.router": "block_sparse_moe.gate.weight",
    "mixer.experts_up": (
        Rows("block_sparse_moe.experts.{expert}.w1.weight", ("gate",)),
        Rows("block_sparse_moe.experts.{expert}.w3.weight", ("up",)),
    ),
    "mixer.experts_down": "block_sparse_moe.experts.{expert}.w2.weight",
}


def _lightning(heads: int) -> Rules:
    return {
        "norm": "input_layernorm",
        "mixer.in_proj": (
            Rows("self_attn.qkv_proj", ("q", "k", "v"), groups=heads),
            Rows("self_attn.output_gate", ("gate",)),
        ),
        "mixer.norm": "self_attn.norm",
        "mixer.out_proj": "self_attn.out_proj",
    }


def _slots(design: ModelConfig) -> Iterator[Named]:
    heads = first(design, LightningAttention, "minimax").heads
    return by_kind({Attention: ATTENTION, LightningAttention: _lightning(heads), MixtureOfExperts: EXPERTS}, per=2)(
        design
    )


def _slope(index: int, count: int) -> float:
    """Of a block's heads; lower down they forget faster."""
    return 1 - index / (count - 1 + 1e-5) + 1e-5


def _wrap(f: Fields, name: str) -> Wrap:
    return Wrap(keep=float(f[f"{name}_alpha_factor"]), factor=float(f[f"{name}_beta_factor"]))


def _design(f: Fields) -> ModelConfig:
    f.must(hidden_act="silu")
    f.carried("block_size", "output_router_logits", "router_jitter_noise")
    heads, count = f["num_attention_heads"], f["num_hidden_layers"]
    size = f.get("head_dim") or f["hidden_size"] // heads
    turned = rope(f) if f.get("rotary_dim") is None else rope(f).replace(fraction=f["rotary_dim"] / size)
    full = Attention(heads=heads, kv_heads=f["num_key_value_heads"], head_dim=size, window=f.get("sliding_window"))
    experts = MixtureOfExperts(
        experts=f["num_local_experts"],
        top_k=f["num_experts_per_tok"],
        hidden=f["intermediate_size"],
        balance_loss=f["router_aux_loss_coef"],
        z_loss=0.0,
    )
    kinds = {
        "A": full.replace(rope=turned, wrap=_wrap(f, "full_attn")),
        "Li": LightningAttention(heads=heads, head_dim=size, norm_eps=LIGHTNING_EPS, wrap=_wrap(f, "linear_attn")),
        "E": experts.replace(wrap=_wrap(f, "mlp")),
    }
    mixers = f.each_of("layer_types", LETTER)
    lightning = [i for i, letter in enumerate(mixers) if letter == "Li"]
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=f["hidden_size"],
        pattern=pattern(letter for mixer in mixers for letter in (mixer, "E")),
        layers={letter: layer for letter, layer in kinds.items() if letter in {*mixers, "E"}},
        at={f"Li#{k}": {"slope": _slope(i, count)} for k, i in enumerate(lightning)},
        norm=RMSNorm(eps=f["rms_norm_eps"]),
        wrap=Wrap(residual="normed"),
        tie_embeddings=f["tie_word_embeddings"],
    )


def _config(design: ModelConfig) -> dict[str, Any]:
    a, e = first(design, Attention, "minimax"), first(design, MixtureOfExperts, "minimax")
    mixers = [place.layer for place in layers(design.slots) if not isinstance(place.layer, MixtureOfExperts)]
    given: dict[str, Any] = {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(mixers),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "sliding_window": a.window,
        "num_local_experts": e.experts,
        "num_experts_per_tok": e.top_k,
        "intermediate_size": e.hidden,
        "router_aux_loss_coef": e.balance_loss,
        "layer_types": ["full_attention" if isinstance(layer, Attention) else "linear_attention" for layer in mixers],
        "rms_norm_eps": design.norm.eps,
        "tie_word_embeddings": design.tied,
    }
    if a.rope is not None:
        given["rope_parameters"] = rope_parameters(a.rope.replace(fraction=1.0))
        given |= {} if a.rope.fraction == 1 else {"rotary_dim": round(a.rope.fraction * a.head_dim)}
    for name, kind in FACTORS.items():
        wrap = first(design, kind, "minimax").wrap
        given |= {f"{name}_alpha_factor": wrap.keep, f"{name}_beta_factor": wrap.factor}
    return given


def _tiny(draw: Random) -> dict[str, Any]:
    config = transformer(draw)
    kinds = draw.choice(
        [["linear_attention", "full_attention"], ["full_attention", "linear_attention", "linear_attention"]]
    )
    experts = draw.choice([(3, 1), (4, 2), (5, 3)])
    factors = {f"{name}_{which}_factor": draw.choice([1, 3.5, 0.6]) for name in FACTORS for which in ("alpha", "beta")}
    return (
        config
        | factors
        | {
            "layer_types": kinds,
            "num_hidden_layers": len(kinds),
            "num_local_experts": experts[0],
            "num_experts_per_tok": experts[1],
            "sliding_window": draw.choice([None, 5]),
            "block_size": draw.choice([256, 7]),
        }
    )


FAMILIES = (
    Family(
        model_type="minimax",
        architecture="MiniMaxForCausalLM",
        design=_design,
        config=_config,
        slots=_slots,
        tiny=_tiny,
        holds=(Attention, LightningAttention, MixtureOfExperts),
        # made anew of the number of the block
        aliases=(r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)",),
    ),
)
