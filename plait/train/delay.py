"""Layers that begin to contribute later than the others (delayed attention, arXiv 2510.00258).

In hybrids, attention finds its shortcuts first, and what a recurrence could have learned instead is then never learned.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from plait.design import ModelConfig
from plait.design.model import nearest_place
from plait.design.places import layers
from plait.model import LanguageModel, listening
from plait.train.config import RunConfig


def begins(run: RunConfig, design: ModelConfig) -> dict[str, int]:
    """The step before which each delayed layer adds nothing, by address. Raises ValueError for a layer that there is not."""
    found: dict[str, int] = {}
    places = list(layers(design.slots))
    known = {place.letter for place in places} | {place.address for place in places}
    for name, amount in run.delayed.items():
        if name not in known:
            raise ValueError(f"delayed: there is no letter or layer {name!r}; {nearest_place(name, known)}")
        own = [place.address for place in places if name in (place.letter, place.address)]
        found |= {address: run.steps_of(amount) for address in own}
    return found


def asleep(begins: dict[str, int], step: int) -> frozenset[str]:
    """The layers that add nothing yet when `step` steps have been made."""
    return frozenset(address for address, first in begins.items() if step < first)


def without(model: LanguageModel, addresses: frozenset[str]) -> AbstractContextManager[None]:
    """Inside, these layers give zeros, and get no gradient: they stay what they are."""
    if not addresses:
        return nullcontext()
    return listening(model, {f"{address}.output": torch.zeros_like for address in addresses})
