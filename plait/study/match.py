"""Designs of equal size from different patterns: the feed-forward layers take up the difference."""

from typing import Any

from plait.design.count import parameters
from plait.design.layers import LETTERS, FeedForward
from plait.design.load import load_design
from plait.design.model import ModelConfig
from plait.design.places import layers

STEP = 8  # hidden channels go in steps of this many, so that matrix multiplications stay aligned
TOLERANCE = 0.03  # matched means: within this share of the budget


def match_parameters(pattern: str, budget: int, **design: Any) -> ModelConfig:
    """The design of `pattern` whose feed-forward layers are as wide as `budget` parameters allow.

    `design` holds the other keys of a design, vocab and dim at least. All feed-forward layers get the same width, a
    multiple of 8. Raises ValueError where the pattern has none, or no width comes within 3 % of the budget.
    """
    base = load_design(pattern, **design)
    bound = LETTERS | base.layers
    mixers = {p.letter: bound[p.letter] for p in layers(base.slots) if isinstance(p.layer, FeedForward)}
    if not mixers:
        raise ValueError(f"pattern {pattern!r} has no feed-forward layer such as F, whose width could match {budget:,}")

    def widened(hidden: int) -> ModelConfig:
        return base.replace(layers=base.layers | {name: layer.replace(hidden=hidden) for name, layer in mixers.items()})

    one, two = parameters(widened(STEP)), parameters(widened(2 * STEP))
    steps = max(1, 1 + round((budget - one) / (two - one)))  # parameters grow in a straight line with the width
    matched = widened(steps * STEP)
    off = parameters(matched) / budget - 1
    if abs(off) > TOLERANCE:
        raise ValueError(
            f"pattern {pattern!r}: {steps * STEP} hidden channels give {parameters(matched):,} parameters, {off:+.1%} "
            f"from the {budget:,} asked for, and no width comes within {TOLERANCE:.0%}; change dim, pattern or budget"
        )
    return matched
