"""Which layers can take an attention layer's weights, and of which sizes."""

from collections.abc import Callable, Mapping
from typing import Any

from plait.design.layers import (
    GLA,
    GRU,
    KINDS,
    LSTM,
    MLSTM,
    Attention,
    DeltaNet,
    GatedDeltaNet,
    KimiDeltaAttention,
    LatentAttention,
    Layer,
    LightningAttention,
    Mamba2,
    RetNet,
    SimpleGLA,
)
from plait.design.layers.rope import LongRoPE
from plait.design.places import read_layer
from plait.design.struct import Struct

Sizes = dict[str, Any]

NOPE_KEY = (
    8  # channels of the shared key of latent attention without positions, which nothing is read from at the start
)


def _linear(a: Attention) -> Sizes:
    """Every query head has a state of its own: keys and values of a group are spelled out for each of its heads."""
    return {"heads": a.heads, "head_dim": a.head_dim, "value_head_dim": a.head_dim}


def _attention(a: Attention) -> Sizes:
    return {"heads": a.heads, "kv_heads": a.kv_heads, "head_dim": a.head_dim}


def _mamba2(a: Attention) -> Sizes:
    """C is q, so that there are as many groups as query heads."""
    return {"heads": a.heads, "head_dim": a.head_dim, "state_dim": a.head_dim, "groups": a.heads}


def _units(a: Attention) -> Sizes:
    return {"heads": a.heads, "head_dim": a.head_dim}


# The sizes that a kind must have to take the weights of such an attention layer.
SIZES: dict[type[Layer], Callable[[Attention], Sizes]] = {
    Attention: _attention,
    LatentAttention: lambda a: {"heads": a.heads, "value_dim": a.head_dim},
    Mamba2: _mamba2,
    GatedDeltaNet: lambda a: {**_linear(a), "value_heads": a.heads} | {"value_head_dim": a.head_dim},
    DeltaNet: _linear,
    KimiDeltaAttention: _linear,
    GLA: _linear,
    SimpleGLA: _linear,
    LightningAttention: _linear,
    RetNet: _linear,
    MLSTM: lambda a: {**_units(a), "key_dim": a.head_dim},
    GRU: lambda a: {**_units(a), "projection": "dense"},
    LSTM: lambda a: {**_units(a), "projection": "dense"},
}


def _latent(a: Attention, data: Mapping[str, Any]) -> Sizes:
    """Half of a head turns, as in Zebra-Llama, by the speeds of its fastest pairs: those that hardly turn lose least by
    standing still (of a byte model KL 0.10 a layer, with every other pair 0.22). Where nothing turns, all is read off the
    latent."""
    both = {"rank": min(2 * a.kv_heads * a.head_dim, 4 * a.head_dim), "scale": a.scale or a.head_dim**-0.5}
    both["latent_norm"] = False
    turned = 0 if a.rope is None else a.rope.rotated(a.head_dim)
    if a.rope is None or not turned:
        return both | {"rope": None, "nope_dim": a.head_dim, "rope_dim": NOPE_KEY}
    here = data.get("rope_dim") or max(2, turned // 4 * 2)
    speeds = a.rope.replace(theta=a.rope.theta ** min(1.0, here / turned))
    if isinstance(speeds.scaling, LongRoPE):
        speeds = speeds.replace(scaling=speeds.scaling.replace(factors=speeds.scaling.factors[: here // 2]))
    return both | {"rope": speeds, "rope_dim": here, "nope_dim": max(1, a.head_dim - here)}


# Linear layers turn queries and keys as the old one did: HypeNet (arXiv 2601.22156) without it finds 47.9 % of needles at 128k
# for 79.9 %, RADLADS (arXiv 2505.03005) keeps it. Mamba-2 and mLSTM are published without positions, and have none.
TURNED = (GatedDeltaNet, DeltaNet, KimiDeltaAttention, GLA, SimpleGLA, LightningAttention, RetNet)

# What a mixer that says nothing of it has, so that it starts near such an attention layer.
DEFAULTS: dict[type[Layer], Callable[[Attention, Mapping[str, Any]], Sizes]] = {
    LatentAttention: _latent,
    **dict.fromkeys(TURNED, lambda a, data: {"rope": a.rope}),
}


def fitted(attention: Attention, mixer: Mapping[str, Any] | Layer | str, where: str) -> Layer:
    """The layer that `mixer` says, every size that it leaves out as `attention`, resolved, needs it.

    Raises ValueError, beginning with `where`, for a kind that takes no weights of attention, and for sizes that cannot: it
    says which can.
    """
    data = plain(mixer, where)
    named = KINDS.get(data["kind"]) if isinstance(data["kind"], str) else None
    kind = named or type(read_layer(data, where))  # raises for an unknown one, naming the nearest
    if kind not in SIZES:
        known = [name for name, other in KINDS.items() if other in SIZES]
        raise ValueError(f"{where}: {data['kind']} takes no weights of attention; what does: {', '.join(known)}")
    if kind is not Attention and attention.wrap is not None and attention.wrap.value_residual:
        raise ValueError(
            f"{where}: its values are mixed with another layer's (wrap.value_residual), which stays attention"
        )
    needed = SIZES[kind](attention)
    wrong = {name: data[name] for name, size in needed.items() if data.get(name, size) != size}
    if wrong:
        got, can = (", ".join(f"{name} {value}" for name, value in sizes.items()) for sizes in (wrong, needed))
        raise ValueError(f"{where}: {data['kind']} with {got} cannot take these weights; what can has {can}")
    if kind is Attention:
        read_layer(data, where)  # raises for a field that does not exist
        alone: dict[str, Any] = {"wrap": None, "shared": False, "adapter_rank": None, "adapted": ()}
        return attention.replace(**alone | {n: v for n, v in data.items() if n != "kind"})
    default = DEFAULTS[kind](attention, data) if kind in DEFAULTS else {}
    return read_layer({**default, **needed, **data}, where)


def unsized(layer: Layer) -> dict[str, Any]:
    """A layer as plain data, without the sizes that attention's weights decide."""
    decided = SIZES[type(layer)](Attention(heads=1, kv_heads=1, head_dim=1)) if type(layer) in SIZES else {}
    return {name: value for name, value in layer.to_dict().items() if name not in decided}


def plain(mixer: Any, where: str = "plan") -> dict[str, Any]:
    """A layer config, a kind's name or a mapping as a mapping with its kind; a mapping without one changes attention. Raises
    ValueError, beginning with `where`, for what is none of them."""
    if not isinstance(mixer, str | Mapping | Struct):
        raise ValueError(f"{where}: expected a layer, such as {{kind: gated_deltanet}}, or branches, got {mixer!r}")
    if isinstance(mixer, Struct):
        return mixer.to_dict()
    return {"kind": mixer} if isinstance(mixer, str) else {"kind": "attention", **mixer}
