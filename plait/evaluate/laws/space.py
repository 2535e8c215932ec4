"""Designs drawn at random from all that a design may say: every layer with every option, every merge, wrap, front and head.

`choose(options)` picks one of a sequence; whoever gives it decides what chance is: a seeded generator, or a test that looks
for the smallest design that breaks a law.
"""

import random
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from plait.design.ends import FRONT_KINDS, HEAD_KINDS
from plait.design.layers import KINDS
from plait.design.layers.layer import Layer, Mixer
from plait.design.merges import MERGE_KINDS
from plait.design.model import ModelConfig
from plait.design.norms import NORM_KINDS
from plait.design.wrap import Wrap

Choose = Callable[[Sequence[Any]], Any]

DIM, VOCAB = 24, 17
SCALED = {"scaling": {"kind": "yarn", "factor": 4.0, "original": 64}}
LONG = {"scaling": {"kind": "longrope", "factor": 4.0, "original": 64, "factors": [1.0, 1.5]}}

# What a field may be, by its name; a field of one class alone as Class.field. Small, odd, and no two alike where that can be.
# Flags and named choices need no line. Sizes are such that no chunk, head or group comes out even.
VALUES: dict[str, tuple[Any, ...]] = {
    "heads": (1, 2, 3),
    "kv_heads": (None, 1),
    "head_dim": (4, 6, 10),
    "value_heads": (None, 6),
    "value_head_dim": (None, 5, 9),
    "state_dim": (3, 7),
    "KimiDeltaAttention.rank": (None, 3),
    "gate_rank": (3, 5),
    "decay_rank": (3,),
    "strength_rank": (4,),
    "value_rank": (5,),
    "HGRN2.lower_bound": (None, 0.0, 0.3),
    "groups": (1,),
    "expand": (1, 2),
    "conv_width": (1, 2, 4),
    "dt_min": (0.0, 0.01),
    "dt_max": (None, 0.05),
    "multipliers": (None, (0.5, 2.0, 0.3, 1.5, 0.7)),
    "hidden": (20, 33),
    "gate_scale": (1.0, 0.6),
    "width": (None, 13, 22),
    "inner_dim": (None, 15, 26),
    "dt_rank": (None, 3),
    "HGRN.lower_bound": (None, 0.3),
    "window": (None, 1, 5),
    "rope": (None, {}, {"fraction": 0.5}, {"theta": 100.0, "max_positions": 500}, SCALED, LONG),
    "softcap": (None, 3.0),
    "scale": (None, 0.3),
    "Attention.bias": (False, True, ("q", "v")),
    "qk_norm": (False, True, "wide"),
    "prefix": (0, 0, 2),
    "temperature": (None, {"every": 20, "scale": 0.1}),
    "nope_dim": (3, 8),
    "rope_dim": (2, 4),
    "value_dim": (5, 8),
    "rank": (7,),
    "query_rank": (None, 9),
    "norm_eps": (None, 1e-3),
    "key_dim": (3, 6),
    "cap": (15.0, 2.0),
    "slope": (1.0, 0.3),
    "temper": (16.0, 2.0),
    "experts": (3, 4),
    "top_k": (1, 2),
    "MixtureOfExperts.groups": (1, 2),
    "top_groups": (1,),
    "group_best": (1, 2),
    "shared_hidden": (None, 11),
    "latent_dim": (None, 10),
    "balance_loss": (0.01,),
    "z_loss": (0.001,),
    "bias_rate": (None, 0.01),
    "gate_bias": (0.0, 2.0, (1.0, 4.0)),
    "spread": (None, 0.7),
    "clip": (None, 0.3),
    "RWKV7.norm_eps": (64e-5, 1e-3),
    "removal_eps": (None, 1e-2),
    "adapter_rank": (None, 2),
    "Sum.weights": ((),),
    "factor": (None, 0.3),
    "keep": (None, None, 0.8),
    "gives": (None, None, "next", "next_added"),
    "eps": (1e-4,),
    "positions": (None, 300),
    "meta": (0, 2),
    "features": (5,),
    "outputs": (3,),
    "Tokens.scale": (1.0, 4.0),
    "Logits.scale": (1.0, 0.5),
    "Vectors.scale": (1.0, 2.0),
    "Regression.scale": (1.0, 0.5),
}

# Fields that say how something is computed, or that are drawn apart
APART = {"wrap", "shared", "adapter_rank", "adapted", "out_proj", "norm", "solver", "tol", "max_passes", "strict"}

PATTERNS = ("X", "XY", "XYX", "XYZ", "[X|Y]", "[X|Y]Z", "[XZ|Y]X", "[X|Y|Z]", "[X[Y|Z]|Y]", "X[Y|Z]")
MOST = 1000  # draws until one fits: options that exclude each other are drawn again


def random_designs(count: int) -> Iterator[ModelConfig]:
    """The same ones every time."""
    generator = random.Random(0)
    for _ in range(count):
        yield fitting(generator.choice)


def fitting(choose: Choose) -> ModelConfig:
    """A design that is one: what options do not go together is drawn again."""
    for _ in range(MOST):
        try:
            return drawn(choose)
        except ValueError:
            continue
    raise RuntimeError(f"none of {MOST} draws was a design")


def drawn(choose: Choose) -> ModelConfig:
    """A design. Raises ValueError for options that do not go together."""
    pattern = choose(PATTERNS)
    layers = {letter: _layer(choose) for letter in "XYZ" if letter in pattern}
    front, head = _any(choose, FRONT_KINDS), _any(choose, HEAD_KINDS)
    merge = _any(choose, MERGE_KINDS)
    if merge.at == "inner" and not all(isinstance(layer, Mixer) for layer in layers.values()):
        merge = merge.replace(at="output")
    return ModelConfig(
        vocab=VOCAB,
        dim=DIM,
        pattern=pattern,
        layers=layers,
        merge=merge,
        norm=_any(choose, NORM_KINDS),
        wrap=_wrap(choose).replace(gives=None),
        front=front,
        head=head,
        tie_embeddings=choose((True, False)),
    )


def _layer(choose: Choose) -> Layer:
    layer = _any(choose, KINDS)
    shared = choose((False, False, True))
    rank = choose((None, 2)) if shared else None
    wrap = _wrap(choose) if choose((False, False, True)) else None
    return layer.replace(shared=shared, adapter_rank=rank, wrap=wrap)


def _wrap(choose: Choose) -> Wrap:
    return _one(choose, Wrap).replace(norm=choose((None, _any(choose, NORM_KINDS))))


def _any(choose: Choose, kinds: dict[str, Any]) -> Any:
    return _one(choose, kinds[choose(sorted(kinds))])


def _one(choose: Choose, kind: Any) -> Any:
    """One of a class, each field drawn."""
    return kind(**{field: choose(options) for field, options in options_of(kind).items()})


def options_of(kind: Any) -> dict[str, tuple[Any, ...]]:
    """What each field of a class may be drawn as. Raises KeyError for a field that `VALUES` does not know."""
    return {
        field.name: _options(kind, field)
        for field in msgspec.structs.fields(kind)
        if field.name not in APART and field.name not in ("import",)
    }


def _options(kind: Any, field: Any) -> tuple[Any, ...]:
    for name in (f"{kind.__name__}.{field.name}", field.name):
        if name in VALUES:
            return VALUES[name]
    optional = [part for part in typing.get_args(field.type) if part is not type(None)] or [field.type]
    none = (None,) if type(None) in typing.get_args(field.type) else ()
    if optional == [bool]:
        return (*none, False, True)
    if typing.get_origin(field.type) is typing.Literal:
        return typing.get_args(field.type)
    if len(optional) == 1 and typing.get_origin(optional[0]) is typing.Literal:
        return (*none, *typing.get_args(optional[0]))
    raise KeyError(f"{kind.__name__}.{field.name}: plait.evaluate.laws.space.VALUES has no values for it")
