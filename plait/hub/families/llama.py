"""Llama and what is laid out like it: Mistral, Qwen2, Qwen3, SmolLM3, Granite's dense models."""

from collections.abc import Sequence
from random import Random
from typing import Any

from plait.design.ends import Logits, Tokens
from plait.design.layers import Attention, RoPE, SwiGLU
from plait.design.layers.feed_forward import Gated
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.design.places import layers
from plait.design.wrap import Wrap
from plait.hub.families.family import Family, blocks, first, pattern
from plait.hub.families.fields import Fields, rope, rope_parameters
from plait.hub.families.tiny import transformer

ATTENTION = {
    "norm": "input_layernorm",
    "mixer.qkv_proj": "self_attn.{part}_proj",
    "mixer.o_proj": "self_attn.o_proj",
    "mixer.q_norm": "self_attn.q_norm",
    "mixer.k_norm": "self_attn.k_norm",
}
SWIGLU = {
    "norm": "post_attention_layernorm",
    "mixer.up_proj": "mlp.{part}_proj",
    "mixer.down_proj": "mlp.down_proj",
}
FULL, SLIDING = "full_attention", "sliding_attention"
LETTER = {FULL: "A", SLIDING: "W"}


def attention(f: Fields, partial: bool = False, **more: Any) -> Attention:
    heads = f["num_attention_heads"]
    head_dim = f.get("head_dim") or f["hidden_size"] // heads
    more = more if "rope" in more else more | {"rope": rope(f, partial=partial)}
    if more["rope"] and int(head_dim * more["rope"].fraction) % 2:
        raise ValueError(
            f"{f.where}: partial_rotary_factor {more['rope'].fraction} of {head_dim} channels are not pairs"
        )
    if more.get("scale") == head_dim**-0.5:  # as ours are without one
        more["scale"] = None
    return Attention(heads=heads, kv_heads=f.get("num_key_value_heads") or heads, head_dim=head_dim, **more)


def swiglu(f: Fields) -> SwiGLU:
    f.must(hidden_act="silu")
    return SwiGLU(hidden=f["intermediate_size"], bias=f.get("mlp_bias", False))


def transformer_design(
    f: Fields, letters: list[str], bound: dict[str, Any], channels: Sequence[str] = (), **more: Any
) -> ModelConfig:
    """Blocks of a token mixer and a channel mixer, a letter for each; the second is F where nothing is said."""
    channels = channels or ["F"] * len(letters)
    norm = more.pop("norm", None) or RMSNorm(eps=f["rms_norm_eps"])
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=f["hidden_size"],
        pattern=pattern(letter for block in zip(letters, channels, strict=True) for letter in block),
        layers={letter: layer for letter, layer in bound.items() if letter in {*letters, *channels}},
        norm=norm,
        tie_embeddings=f["tie_word_embeddings"],
        **more,
    )


def transformer_config(design: ModelConfig, family: str, kind: type[Gated] = SwiGLU) -> dict[str, Any]:
    """Of a design's first attention and feed-forward layer, and its ends."""
    return attention_config(design, family) | {"intermediate_size": first(design, kind, family).hidden}


def attention_config(design: ModelConfig, family: str) -> dict[str, Any]:
    """The same without the feed-forward layer."""
    a = first(design, Attention, family)
    heads = {"num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "head_dim": a.head_dim}
    return size_config(design) | heads | ({} if a.rope is None else {"rope_parameters": rope_parameters(a.rope)})


def size_config(design: ModelConfig) -> dict[str, Any]:
    """Of all layers together."""
    return {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(design.slots) // 2,
        "rms_norm_eps": design.norm.eps,
        "tie_word_embeddings": design.tied,
    }


def mixers(design: ModelConfig) -> list[Attention]:
    return [place.layer for place in layers(design.slots) if isinstance(place.layer, Attention)]


def window_config(design: ModelConfig) -> dict[str, Any]:
    """Which layers see a window, and how wide it is where some do."""
    widths = [layer.window for layer in mixers(design)]
    kinds = [FULL if width is None else SLIDING for width in widths]
    return {"layer_types": kinds} | ({"sliding_window": max(width or 0 for width in widths)} if any(widths) else {})


def mixer_letters(f: Fields) -> list[str]:
    """A or W for each block, by its type; W only where a width is given."""
    letters = f.each_of("layer_types", LETTER)
    if "W" in letters and not f.get("sliding_window"):
        raise ValueError(
            f"{f.where}: layer_types has {SLIDING!r}, for which sliding_window must be above 0 and use_sliding_window, where "
            f"the family has it, true; got {f.get('sliding_window')!r}"
        )
    return letters


def turns_by_type(f: Fields) -> dict[str, RoPE]:
    """By what angles layers turn, where those that see a window may turn by others. YaRN's bounds are whole numbers there: what
    `truncate` says is not heeded."""
    given = {kind: Fields(f["rope_parameters"][kind], f"{f.where}: rope_parameters") for kind in (FULL, SLIDING)}
    for parameters in given.values():
        parameters.must(truncate=True)
    return {kind: rope(f, parameters) for kind, parameters in given.items()}


def by_type(design: ModelConfig) -> dict[str, Any]:
    """By what angles layers turn that see all, and those that see a window."""
    turns = {FULL if layer.window is None else SLIDING: layer.rope for layer in mixers(design)}
    return {"rope_parameters": {kind: rope_parameters(turned) for kind, turned in turns.items() if turned}}


def _llama(f: Fields) -> ModelConfig:
    a = attention(f, bias=f["attention_bias"])
    return transformer_design(f, ["A"] * f["num_hidden_layers"], {"A": a, "F": swiglu(f)})


def _llama_config(design: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": first(design, Attention, "llama").bias, "mlp_bias": first(design, SwiGLU, "llama").bias}
    return transformer_config(design, "llama") | biases


def _mistral(f: Fields) -> ModelConfig:
    a = attention(f, window=f.get("sliding_window"))
    return transformer_design(f, ["A"] * f["num_hidden_layers"], {"A": a, "F": swiglu(f)})


def _mistral_config(design: ModelConfig) -> dict[str, Any]:
    return transformer_config(design, "mistral") | {"sliding_window": first(design, Attention, "mistral").window}


def _qwen2(f: Fields) -> ModelConfig:
    return _windowed(f, attention(f, bias=("q", "k", "v")))


def _qwen3(f: Fields) -> ModelConfig:
    return _windowed(f, attention(f, bias=f["attention_bias"], qk_norm=True))


def _windowed(f: Fields, a: Attention) -> ModelConfig:
    f.carried("use_sliding_window", "max_window_layers", "num_hidden_layers")  # `layer_types` says what comes of them
    letters, windowed = mixer_letters(f), a.replace(window=f.get("sliding_window"))
    return transformer_design(f, letters, {"A": a, "W": windowed, "F": swiglu(f)})


def _qwen2_config(design: ModelConfig) -> dict[str, Any]:
    windowed = window_config(design)
    sliding = {"use_sliding_window": SLIDING in windowed["layer_types"]}
    return transformer_config(design, "qwen") | windowed | sliding


def _qwen3_config(design: ModelConfig) -> dict[str, Any]:
    return _qwen2_config(design) | {"attention_bias": first(design, Attention, "qwen3").bias}


def _smollm3(f: Fields) -> ModelConfig:
    f.must(use_sliding_window=False)
    f.each_of("layer_types", {FULL: "A"})  # masks of transformers' class heed it, whatever `use_sliding_window` says
    f.carried("sliding_window", "no_rope_layer_interval")
    a = attention(f, bias=f["attention_bias"])
    letters = ["A" if turned else "N" for turned in f["no_rope_layers"][: f["num_hidden_layers"]]]
    return transformer_design(f, letters, {"A": a, "N": a.replace(rope=None), "F": swiglu(f)})


def _smollm3_config(design: ModelConfig) -> dict[str, Any]:
    found = mixers(design)
    turned = next((layer.rope for layer in found if layer.rope), None)
    return (
        transformer_config(design, "smollm3")
        | ({} if turned is None else {"rope_parameters": rope_parameters(turned)})
        | {"no_rope_layers": [int(layer.rope is not None) for layer in found]}
        | {"attention_bias": found[0].bias, "mlp_bias": first(design, SwiGLU, "smollm3").bias}
    )


def _granite(f: Fields) -> ModelConfig:
    a = attention(f, bias=f["attention_bias"], scale=f["attention_multiplier"])
    return transformer_design(
        f,
        ["A"] * f["num_hidden_layers"],
        {"A": a, "F": swiglu(f)},
        front=Tokens(scale=f["embedding_multiplier"]),
        head=Logits(scale=1 / f["logits_scaling"]),
        wrap=Wrap(factor=f["residual_multiplier"]),
    )


def _granite_config(design: ModelConfig) -> dict[str, Any]:
    a = first(design, Attention, "granite")
    return _llama_config(design) | {
        "attention_multiplier": a.scale or a.head_dim**-0.5,
        "embedding_multiplier": design.front.scale,
        "logits_scaling": 1 / design.head.scale,
        "residual_multiplier": design.full_wrap.factor,
    }


def _tiny_llama(draw: Random) -> dict[str, Any]:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    scaled: list[dict[str, Any]] = [
        {},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **llama3}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ]
    biases = {name: draw.random() < 0.5 for name in ("attention_bias", "mlp_bias")}
    return transformer(draw) | biases | draw.choice(scaled)


def _tiny_mistral(draw: Random) -> dict[str, Any]:
    return transformer(draw) | {"sliding_window": draw.choice([None, 4])}


def _tiny_qwen3(draw: Random) -> dict[str, Any]:
    return _tiny_windows(draw) | {"attention_bias": draw.random() < 0.5}


def _tiny_windows(draw: Random) -> dict[str, Any]:
    config = transformer(draw)
    kinds = [draw.choice([FULL, SLIDING]) for _ in range(config["num_hidden_layers"])]
    window = {"sliding_window": draw.choice([3, 8]), "layer_types": kinds, "use_sliding_window": True}
    return config | (window if draw.random() < 0.7 else {})


def _tiny_smollm3(draw: Random) -> dict[str, Any]:
    config = transformer(draw, head_dim=False)
    turned = [draw.choice([0, 1]) for _ in range(config["num_hidden_layers"])]
    return config | {"no_rope_layers": turned, "pad_token_id": 0, "attention_bias": draw.random() < 0.5}


def _tiny_granite(draw: Random) -> dict[str, Any]:
    multipliers = {"attention_multiplier": 0.3, "embedding_multiplier": 6.0, "logits_scaling": 4.0}
    return transformer(draw, head_dim=False) | multipliers | {"residual_multiplier": draw.choice([0.22, 1.0])}


def _family(model_type: str, architecture: str, design: Any, config: Any, tiny: Any) -> Family:
    return Family(
        model_type=model_type,
        architecture=f"{architecture}ForCausalLM",
        design=design,
        config=config,
        slots=blocks(ATTENTION, SWIGLU),
        tiny=tiny,
        holds=(Attention, SwiGLU),
        aliases=(r".*rotary_emb\.inv_freq",),
    )


FAMILIES = (
    _family("llama", "Llama", _llama, _llama_config, _tiny_llama),
    _family("mistral", "Mistral", _mistral, _mistral_config, _tiny_mistral),
    _family("qwen2", "Qwen2", _qwen2, _qwen2_config, _tiny_windows),
    _family("qwen3", "Qwen3", _qwen3, _qwen3_config, _tiny_qwen3),
    _family("smollm3", "SmolLM3", _smollm3, _smollm3_config, _tiny_smollm3),
    _family("granite", "Granite", _granite, _granite_config, _tiny_granite),
)
