"""HGRN-2 in folders of flash-linear-attention, whose layers share one tensor of bounds that grow with depth.

A softmax of `model.lower_bounds` (layers, channels) over the layers gives what each adds to the bound of the one before; layer
0 has none, so that the bound of layer i is the sum of shares 1 to i. Ours is each layer's own, as log-odds.
"""

from collections.abc import Iterator
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.design.layers import HGRN2, SwiGLU
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.hub.families.family import Family, Named, all_of, first
from plait.hub.families.fields import Fields
from plait.hub.families.fla import COMMON, ENDS, MLP, common, swiglu
from plait.hub.weight_table import Form, Rows, Rules

NORM_EPS = 1e-5  # of what the state gives, whatever the config's norm_eps; its queries are state_dim^-1/2 of ours
# In log-odds, between layers of one bound: too little to be seen in float32, and its share has a logarithm.
LEAST = 2.0**-30
DEFAULTS: dict[str, Any] = COMMON | {
    "num_heads": None,
    "expand_ratio": 128,
    "use_lower_bound": True,
    "use_short_conv": False,
    "elementwise_affine": True,
}


def _log_odds(tensor: Tensor) -> Tensor:
    """Of the bounds of layers 1 on, one after the other (channels of layer 1, of layer 2, ...), of their tensor (layers,
    channels). In float64, log(bound) - log(1 - bound), each from a sum of its own shares: exact near 0 and 1 too."""
    x = tensor.double()
    below = x[1:].logcumsumexp(0)
    above = torch.cat([x[:1], x[2:].flip(0)]).logcumsumexp(0).flip(0)
    return (below - above).flatten()


def _shares(layers: int, flat: Tensor) -> Tensor:
    """Their tensor of the log-odds: logarithms of the shares, in float64, each channel's about 0, as training from zeros leaves
    them. sigmoid(a) - sigmoid(b) is sigmoid(a) sigmoid(-b) (1 - e^(b - a)), in which no digits cancel."""
    bounds = flat.double().view(layers - 1, -1)
    before, after = bounds[:-1], bounds[1:]
    grown = F.logsigmoid(after) + F.logsigmoid(-before) + (-torch.expm1(-(after - before).clamp(min=LEAST))).log()
    shares = torch.cat([F.logsigmoid(-bounds[-1:]), F.logsigmoid(bounds[:1]), grown])
    return (shares - shares.mean(0)).to(flat.dtype)


def _falls(layers: int, flat: Tensor) -> str | None:
    bounds = flat.view(layers - 1, -1)
    for i, (before, after) in enumerate(zip(bounds, bounds[1:], strict=False), 2):
        if falling := (~(after >= before)).nonzero().flatten().tolist():  # or NaN
            channel = falling[0]
            low, high = (float(x[channel].sigmoid()) for x in (after, before))
            layer = f"the bound of HGRN-2 layer #{i} falls at channel {channel}"
            return f"{layer}, from {high:.4g} to {low:.4g}; there bounds grow with depth"
    return None


def bounds(layers: int) -> Form:
    return Form(_log_odds, lambda x: _shares(layers, x), exact=False, refusal=lambda x: _falls(layers, x))


def _slots(design: ModelConfig) -> Iterator[Named]:
    layers = len(design.slots) // 2
    form = bounds(layers)
    for i in range(layers):
        block = f"layers.{i}."
        mixer: Rules = {
            "norm": f"{block}attn_norm",
            "mixer.in_proj": tuple(Rows(f"{block}attn.{part}_proj", (part,)) for part in "qfi"),
            "mixer.bound": Rows("lower_bounds", form=form, share=(i - 1, layers - 1)),
            "mixer.norm": f"{block}attn.g_norm",
            "mixer.out_proj": f"{block}attn.o_proj",
        }
        yield Named(f"slots.{2 * i}.", "model.", mixer)
        yield Named(f"slots.{2 * i + 1}.", f"model.{block}", MLP)


def _sizes(f: Fields) -> dict[str, int]:
    """`expand_ratio` says it, whatever `num_heads` says; without it, heads do."""
    dim, heads, width = f["hidden_size"], f["num_heads"], f["expand_ratio"]
    width = dim // heads if heads and width is None else width
    if not width:
        raise ValueError(
            f"{f.where}: num_heads {heads} and expand_ratio {width} do not say how wide a head of {dim} is"
        )
    if f["use_lower_bound"] and dim % width:
        raise ValueError(f"{f.where}: expand_ratio {width} must divide hidden_size {dim}, as wide as the bounds are")
    return {"heads": dim // width, "state_dim": width}


def _design(f: Fields) -> ModelConfig:
    common(f)
    f.must(use_short_conv=False, elementwise_affine=True)
    f.carried("conv_size", "share_conv_kernel")
    layers, bounded = f["num_hidden_layers"], f["use_lower_bound"]
    if bounded and layers == 1:
        raise ValueError(
            f"{f.where}: use_lower_bound: the only layer has no bound; say false, without model.lower_bounds"
        )
    sizes = _sizes(f)
    mixer = HGRN2(**sizes, lower_bound=None if bounded else 0.0, norm_eps=NORM_EPS * sizes["state_dim"])
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=f["hidden_size"],
        pattern=f"(XF){layers}",
        layers={"X": mixer, "F": swiglu(f)},
        at={"X#0": {"lower_bound": 0.0}} if bounded else {},
        norm=RMSNorm(eps=f["norm_eps"]),
        tie_embeddings=f["tie_word_embeddings"],
    )


def _config(design: ModelConfig) -> dict[str, Any]:
    x = first(design, HGRN2, "hgrn2")
    return {
        "vocab_size": design.vocab,
        "hidden_size": design.dim,
        "num_hidden_layers": len(design.slots) // 2,
        "num_heads": x.heads,
        "expand_ratio": x.state_dim,
        "use_lower_bound": any(layer.lower_bound is None for layer in all_of(design, HGRN2)),
        "intermediate_size": first(design, SwiGLU, "hgrn2").hidden,
        "norm_eps": design.norm.eps,
        "tie_word_embeddings": design.tied,
    }


def _tiny(draw: Random) -> dict[str, Any]:
    bounded = draw.random() < 0.9
    heads, width = draw.choice([(1, 16), (2, 16), (3, 8), (2, 12)])
    said = draw.choice([{"num_heads": heads, "expand_ratio": None}, {"expand_ratio": width}])
    return said | {
        "vocab_size": 37,
        "hidden_size": heads * width,
        "num_hidden_layers": draw.choice([2, 3, 4]) if bounded else draw.choice([1, 2]),
        "use_lower_bound": bounded,
        "intermediate_size": draw.choice([24, 40]),
        "norm_eps": draw.choice([1e-5, 1e-6]),
        "tie_word_embeddings": draw.random() < 0.5,
    }


FAMILIES = (
    Family(
        model_type="hgrn2",
        architecture="HGRN2ForCausalLM",
        design=_design,
        config=_config,
        slots=_slots,
        tiny=_tiny,
        holds=(HGRN2, SwiGLU),
        ends=ENDS,
        defaults=DEFAULTS,
        alike=(("intermediate_size",), ("num_heads",), ("expand_ratio",)),
    ),
)
