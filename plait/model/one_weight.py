"""Weights that lie at several places in a model, as those of a shared layer do, through what torch does place by place."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

Place = tuple[nn.Module, str]


@contextmanager
def one_weight(model: nn.Module) -> Iterator[None]:
    """A parameter at several places before is one after, where torch has made one for each: that of the first place."""
    places: dict[nn.Parameter, list[Place]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places[parameter].append((module, name))
    several = [found for found in places.values() if len(found) > 1]
    yield
    for (module, name), *others in several:
        for other, its_name in others:
            setattr(other, its_name, getattr(module, name))
