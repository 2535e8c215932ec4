"""Folders of flash-linear-attention: GLA, RetNet, DeltaNet and gated DeltaNet, each layer before a SwiGLU."""

from collections.abc import Callable
from random import Random
from typing import Any

from plait.design.layers import GLA, DeltaNet, GatedDeltaNet, Layer, RetNet, SwiGLU
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.hub.families.family import Family, blocks, first
from plait.hub.families.fields import Fields
from plait.hub.weight_table import Either, Rows, Rules

ENDS: Rules = {"embed": "model.embeddings", "norm": "model.norm", "lm_head": "lm_head"}
MLP: Rules = {"norm": "mlp_norm", "mixer.up_proj": "mlp.{part}_proj", "mixer.down_proj": "mlp.down_proj"}
MIXER: Rules = {"norm": "attn_norm", "mixer.out_proj": "attn.o_proj"}
QKV = tuple(Rows(f"attn.{part}_proj", (part,)) for part in "qkv")
# norm and gate are one module or, with fuse_norm false, two
GATED = {**MIXER, "mixer.norm": Either(("attn.g_norm_swish_gate", "attn.g_norm"))}
DELTA = {**MIXER, "mixer.norm": "attn.o_norm", "mixer.conv1d": "attn.{part}_conv1d"}
RULES: dict[type[Layer], Rules] = {
    GLA: {
        **GATED,
        "mixer.in_proj": (*QKV, Rows("attn.g_proj", ("z",)), Rows("attn.gk_proj.0", ("decay",))),
        "mixer.decay_proj": "attn.gk_proj.1",
    },
    RetNet: {**GATED, "mixer.in_proj": (*QKV, Rows("attn.g_proj", ("gate",)))},
    DeltaNet: {**DELTA, "mixer.in_proj": (*QKV, Rows("attn.b_proj", ("b",)))},
    GatedDeltaNet: {
        **DELTA,
        "mixer.in_proj": (
            *QKV,
            Rows("attn.g_proj", ("z",)),
            *(Rows(f"attn.{part}_proj", (part,)) for part in "ab"),
        ),
        "mixer.A_log": "attn.A_log",
        "mixer.dt_bias": "attn.dt_bias",
    },
}
# what the library's config classes say where a config does not
COMMON = {
    "attn": None,
    "attn_mode": "chunk",
    "hidden_size": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "num_hidden_layers": 24,
    "norm_eps": 1e-6,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
    "fuse_norm": True,
    "conv_size": 4,
}
LINEAR = {
    **COMMON,
    "num_kv_heads": None,
    "feature_map": None,
    "use_short_conv": False,
    "use_output_gate": True,
    "elementwise_affine": True,
}
RULE = {**COMMON, "use_short_conv": True, "allow_neg_eigval": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gla": LINEAR
    | {"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "clamp_min": None, "use_gk": True, "use_gv": False},
    "retnet": LINEAR | {"num_heads": 8, "expand_k": 1.0, "expand_v": 2.0, "hidden_ratio": 2},
    "delta_net": RULE
    | {"num_heads": 16, "expand_k": 1.0, "expand_v": 1.0, "use_gate": False, "use_beta": True}
    | {"qk_norm": "l2", "qk_activation": "silu"},
    "gated_deltanet": RULE
    | {"num_heads": 6, "num_v_heads": None, "head_dim": 256, "expand_v": 2.0, "use_gate": True, "num_hidden_layers": 21}
    | {"output_gate_activation": "swish"},
}
SPEED = ("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")
CONV = {"conv_bias": False, "use_short_conv": True, "share_conv_kernel": False, "norm_first": False}


def common(f: Fields) -> None:
    """What changes nothing, and what plait has no layers for: attention between, residuals that are attended to."""
    f.carried(*SPEED)
    if f.get("attn") is not None:
        raise ValueError(f"{f.where}: attn: layers of attention between are not read")
    if f.get("attnres_block_size") is not None:
        raise ValueError(f"{f.where}: attnres_block_size: residuals that are attended to are not read")


def swiglu(f: Fields) -> SwiGLU:
    """Of an `intermediate_size` or, without one, of a ratio, in steps of 256."""
    f.must(hidden_act="swish")
    hidden, ratio = f.get("intermediate_size"), f["hidden_ratio"] or 4
    if hidden is None:
        hidden = -(-int(f["hidden_size"] * ratio * 2 / 3) // 256) * 256
    return SwiGLU(hidden=hidden)


def _design(layer: Callable[[Fields], Layer]) -> Callable[[Fields], ModelConfig]:
    def design(f: Fields) -> ModelConfig:
        common(f)
        return ModelConfig(
            vocab=f["vocab_size"],
            dim=f["hidden_size"],
            pattern=f"(XF){f['num_hidden_layers']}",
            layers={"X": layer(f), "F": swiglu(f)},
            norm=RMSNorm(eps=f["norm_eps"]),
            tie_embeddings=f["tie_word_embeddings"],
        )

    return design


def _sizes(f: Fields) -> dict[str, int]:
    """Of heads whose widths are said as shares of the model's."""
    heads = f["num_heads"]
    keys, values = (round(f["hidden_size"] * f[name]) // heads for name in ("expand_k", "expand_v"))
    return {"heads": heads, "head_dim": keys, "value_head_dim": values}


def _linear(f: Fields) -> None:
    f.must(use_short_conv=False, use_output_gate=True, elementwise_affine=True, num_kv_heads=(None, f["num_heads"]))
    if f.get("feature_map") is not None:
        raise ValueError(f"{f.where}: feature_map {f['feature_map']!r} is not supported")
    f.carried("conv_size", "share_conv_kernel")


def _gla(f: Fields) -> GLA:
    _linear(f)
    f.carried("use_gk", "use_gv")
    if f.get("clamp_min") is not None:
        raise ValueError(f"{f.where}: clamp_min {f['clamp_min']!r} is not supported; plait bounds no decays")
    return GLA(**_sizes(f))


def _retnet(f: Fields) -> RetNet:
    _linear(f)
    return RetNet(**_sizes(f))


def _delta_net(f: Fields) -> DeltaNet:
    f.must(**CONV, use_beta=True, use_gate=False, use_output_norm=True, qk_norm="l2", qk_activation="silu")
    return DeltaNet(**_sizes(f), conv_width=f["conv_size"], negative_eigenvalues=f["allow_neg_eigval"])


def _gated_deltanet(f: Fields) -> GatedDeltaNet:
    f.must(**CONV, use_gate=True, output_gate_activation=("swish", "silu"))
    return GatedDeltaNet(
        heads=f["num_heads"],
        head_dim=f["head_dim"],
        value_heads=f.get("num_v_heads") or f["num_heads"],
        value_head_dim=round(f["head_dim"] * f["expand_v"]),
        conv_width=f["conv_size"],
        negative_eigenvalues=f["allow_neg_eigval"],
    )


def _config(name: str, kind: type[Layer]) -> Callable[[ModelConfig], dict[str, Any]]:
    def config(design: ModelConfig) -> dict[str, Any]:
        x: Any = first(design, kind, name)
        if kind is GatedDeltaNet:
            sizes = {"head_dim": x.head_dim, "num_v_heads": x.value_heads, "expand_v": x.value_head_dim / x.head_dim}
        else:
            keys, values = (x.heads * width / design.dim for width in (x.head_dim, x.value_head_dim))
            sizes = {"expand_k": keys, "expand_v": values}
        if kind in (DeltaNet, GatedDeltaNet):
            sizes |= {"conv_size": x.conv_width, "allow_neg_eigval": x.negative_eigenvalues}
        return sizes | {
            "num_heads": x.heads,
            "vocab_size": design.vocab,
            "hidden_size": design.dim,
            "num_hidden_layers": len(design.slots) // 2,
            "intermediate_size": first(design, SwiGLU, name).hidden,
            "norm_eps": design.norm.eps,
            "tie_word_embeddings": design.tied,
        }

    return config


def _tiny(name: str) -> Callable[[Random], dict[str, Any]]:
    def tiny(draw: Random) -> dict[str, Any]:
        heads, width = draw.choice([(1, 16), (2, 16), (3, 8), (2, 12)])
        config: dict[str, Any] = {
            "vocab_size": 37,
            "hidden_size": heads * width,
            "num_hidden_layers": draw.choice([1, 2]),
            "num_heads": heads,
            "intermediate_size": draw.choice([24, 40]),
            "norm_eps": draw.choice([1e-5, 1e-6]),
            "tie_word_embeddings": draw.random() < 0.5,
            "expand_v": draw.choice([0.5, 1.0, 2.0]),
        }
        if name == "gated_deltanet":
            return config | {
                "head_dim": width,
                "num_v_heads": draw.choice([None, heads * 2]),
                "allow_neg_eigval": draw.random() < 0.5,
            }
        config |= {"expand_k": draw.choice([0.5, 1.0])}
        return config | (
            {"allow_neg_eigval": draw.random() < 0.5, "conv_size": draw.choice([3, 4])} if name == "delta_net" else {}
        )

    return tiny


def _family(name: str, architecture: str, kind: type[Layer], layer: Callable[[Fields], Layer]) -> Family:
    return Family(
        model_type=name,
        architecture=f"{architecture}ForCausalLM",
        design=_design(layer),
        config=_config(name, kind),
        slots=blocks(RULES[kind], MLP),
        tiny=_tiny(name),
        holds=(kind, SwiGLU),
        ends=ENDS,
        defaults=DEFAULTS[name],
        alike=(("intermediate_size",), ("num_v_heads",), ("expand_k",), ("expand_v",)),
    )


FAMILIES = (
    _family("gla", "GLA", GLA, _gla),
    _family("retnet", "RetNet", RetNet, _retnet),
    _family("delta_net", "DeltaNet", DeltaNet, _delta_net),
    _family("gated_deltanet", "GatedDeltaNet", GatedDeltaNet, _gated_deltanet),
)
