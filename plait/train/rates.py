"""Learning rates that differ between the parts of one model: weights that are new beside weights that are trained already."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from plait.design.model import nearest_place
from plait.design.places import prefixed
from plait.model import LanguageModel


def rates(model: LanguageModel, given: Mapping[str, float]) -> dict[str, float]:
    """What each weight's learning rate is multiplied by, by its name: `RunConfig.rates`. Raises ValueError for a key that fits
    nothing."""
    places = list(prefixed(model.design.slots))
    names = [name for name, _ in model.named_parameters()]
    found = dict.fromkeys(names, 1.0)
    for key, rate in given.items():
        within = tuple(prefix for prefix, place in places if key in (place.letter, place.address))
        own = [name for name in names if (name.startswith(within) if within else fnmatchcase(name, key))]
        if not own:
            known = [*dict.fromkeys(place.letter for _, place in places), *(place.address for _, place in places)]
            raise ValueError(f"rates: no layer or weight is {key!r}; {nearest_place(key, known)}")
        found |= dict.fromkeys(own, rate)
    return found


@contextmanager
def frozen(model: nn.Module, rates: Mapping[str, float]) -> Iterator[None]:
    """Inside, weights whose rate is 0 get no gradients, and no work is done for them."""
    still = [p for name, p in model.named_parameters() if rates[name] == 0 and p.requires_grad]
    try:
        for parameter in still:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)
