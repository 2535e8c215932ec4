"""Balancing experts without a loss: biases that choose, moved after each step by what the experts were loaded with
(arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.layers.moe import LOAD, MixtureOfExpertsLayer
from plait.model import LanguageModel


def rebalance(model: LanguageModel, stats: Mapping[str, Mapping[str, Any]], broken: Tensor) -> None:
    """`stats` of the whole step, by address. Nothing moves where `broken` is above 0, and nobody waits to know. The uses of a
    shared layer are loaded together."""
    loads: dict[int, tuple[MixtureOfExpertsLayer, Tensor]] = {}
    for address, own in stats.items():
        layer = model.place(address) if LOAD in own else None
        if isinstance(layer, MixtureOfExpertsLayer) and layer.router_bias is not None:
            before = loads.get(id(layer.router_bias))
            loads[id(layer.router_bias)] = layer, own[LOAD].double() + (0 if before is None else before[1])
    for layer, tokens in loads.values():
        layer.rebalance(tokens, broken == 0)
