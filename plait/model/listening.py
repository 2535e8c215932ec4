"""Listening in on what layers compute: for analysis, ablation and distillation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from plait.design.places import layers, paths
from plait.layers.channels import Listener, Place
from plait.model.language_model import LanguageModel


@contextmanager
def listening(model: LanguageModel, listeners: Mapping[str, Listener]) -> Iterator[None]:
    """Inside, `{"A#3.output": listener}` gets what A#3 hands to `context.tap("output", ...)` in every call of the model, and
    what it returns stands in for that; None leaves it as it is.

    Every layer taps its "output" (b, t, dim), before it is normed, scaled and added to the stream. A listener sees tensors
    of the call, gradients and all; packed or padded rows arrive end to end in one row. Activation checkpointing calls it
    again in the backward pass. Raises ValueError for an address that does not exist, and in a call for a name not tapped.
    """
    slots: dict[int, dict[Place, Listener]] = {i: dict(there) for i, there in model.listeners.items()}
    for key, listener in listeners.items():
        address, _, name = key.partition(".")
        model.design.place(address)  # raises for an address that does not exist
        for i, slot in enumerate(model.design.slots):
            for path in (path for path, here in paths(slot).items() if here == address):
                slots.setdefault(i, {})[path, name] = listener
    before, model.listeners = model.listeners, slots
    try:
        yield
    finally:
        model.listeners = before


@contextmanager
def checking(model: LanguageModel) -> Iterator[None]:
    """Inside, a call in which a layer gives what is not finite raises FloatingPointError, naming the first that does.

    Every layer of every call waits for the device: for finding a fault, not for running without one.
    """
    with listening(model, {f"{place.address}.output": _finite(place.address) for place in layers(model.design.slots)}):
        yield


def _finite(address: str) -> Listener:
    def look(y: Tensor) -> None:
        if not y.isfinite().all():
            what = "NaN" if y.isnan().any() else "infinity"
            raise FloatingPointError(f"{address} gives {what}: {int((~y.isfinite()).sum())} of {y.numel()} numbers")

    return look
