"""Learning rates that differ between the parts of one model: weights that are new beside weights that are trained already."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from plait.design.lora import lora_weights
from plait.design.model import nearest_place
from plait.design.places import Place, prefixed
from plait.model import LanguageModel


def rates(model: LanguageModel, given: Mapping[str, float]) -> dict[str, float]:
    """What each weight's learning rate is multiplied by, by its name: `RunConfig.rates`. Raises ValueError for a key that fits
    nothing, or nothing that is trained where additions alone are."""
    places = list(prefixed(model.design.slots))
    names = [name for name, _ in model.named_parameters()]
    found = dict.fromkeys(names, 1.0)
    additions = [] if model.lora is None else [weight.name for weight in lora_weights(model.design, model.lora)]
    for key, rate in given.items():
        within = tuple(prefix for prefix, place in places if key in (place.letter, place.address))
        own = [name for name in names if (name.startswith(within) if within else fnmatchcase(name, key))]
        if not own:
            known = [*dict.fromkeys(place.letter for _, place in places), *(place.address for _, place in places)]
            raise ValueError(f"rates: no layer or weight is {key!r}; {nearest_place(key, known)}")
        if additions and not set(additions) & set(own):
            adapted = dict.fromkeys(_where(name, places) for name in additions)
            raise ValueError(
                f"rates.{key}: lora adds nothing there, and only its additions learn; it adds to {', '.join(adapted)}"
            )
        found |= dict.fromkeys(own, rate)
    return found


def _where(name: str, places: list[tuple[str, Place]]) -> str:
    """The letter of the layer that a weight is in, or its module."""
    letters = (place.letter for prefix, place in places if name.startswith(prefix))
    return next(letters, name.partition(".lora_")[0])


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
