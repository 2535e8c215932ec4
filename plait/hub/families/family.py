"""What a family of models is to plait: its config as a design and back, and where its tensors lie."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

from plait.design.layers import Layer
from plait.design.model import ModelConfig
from plait.design.pattern import parse, render
from plait.design.places import layers
from plait.hub.families.fields import Fields
from plait.hub.weight_table import Rules

L = TypeVar("L", bound=Layer)
ENDS = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}


@dataclass(frozen=True, slots=True)
class Named:
    """A slot's weights: those inside `ours` ("slots.3.") lie inside `theirs` ("model.layers.1."), by `rules`."""

    ours: str
    theirs: str
    rules: Rules


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type` of transformers.

    design: of a config, every field of which it reads or names as carried. config: of a design, the fields that say what it
    is; that they say all of it is not its business: what is exported is read again and compared.
    slots: where the weights of each slot lie. ends: those of front and head. aliases: regular expressions of tensors that
    repeat others or hold no numbers of the model's own.
    alike: fields, together, that may say the same in several ways: they stay what they were where they still say it.
    tiny: fields of a small config, drawn from all that the family allows.
    defaults: of the config, where transformers has no class that knows them.
    within: what names of tensors begin with in files of several parts, and what here: ("model.language_model.", "model.").
    """

    model_type: str
    architecture: str
    design: Callable[[Fields], ModelConfig]
    config: Callable[[ModelConfig], dict[str, Any]]
    slots: Callable[[ModelConfig], Iterator[Named]]
    tiny: Callable[[Random], dict[str, Any]]
    holds: tuple[type[Layer], ...]
    ends: Rules = field(default_factory=lambda: ENDS)
    aliases: tuple[str, ...] = ()
    alike: tuple[tuple[str, ...], ...] = ()
    within: tuple[tuple[str, str], ...] = ()
    defaults: Mapping[str, Any] | None = None

    def named(self, name: str) -> str:
        """What a tensor is called where the text model stands alone."""
        for longer, shorter in self.within:
            if name.startswith(longer):
                return f"{shorter}{name.removeprefix(longer)}"
        return name


def blocks(*rules: Rules, inside: str = "model.layers.{}.") -> Callable[[ModelConfig], Iterator[Named]]:
    """The slots of a design whose layers in theirs are so many slots in a row each."""

    def named(design: ModelConfig) -> Iterator[Named]:
        for i in range(len(design.slots)):
            yield Named(f"slots.{i}.", inside.format(i // len(rules)), rules[i % len(rules)])

    return named


def by_kind(rules: Mapping[type[Layer], Rules], per: int, inside: str = "model.layers.{}.") -> Any:
    """The same where what a slot's rules are depends on its layer's kind."""

    def named(design: ModelConfig) -> Iterator[Named]:
        for i, slot in enumerate(design.slots):
            yield Named(f"slots.{i}.", inside.format(i // per), rules[type(slot.layer)])  # type: ignore[union-attr]  # no parallel slot passes `holds`

    return named


def pattern(letters: Iterable[str]) -> str:
    """Of a letter for each slot, as short as it can be said."""
    return render(parse(" ".join(letters)))


def all_of(design: ModelConfig, kind: type[L]) -> list[L]:
    """A design's layers of a kind, in order."""
    return [place.layer for place in layers(design.slots) if isinstance(place.layer, kind)]


def first(design: ModelConfig, kind: type[L], family: str) -> L:
    """A design's first layer of a kind. Raises ValueError where it has none."""
    for layer in all_of(design, kind):
        return layer
    raise ValueError(f"{family} cannot hold {design.pattern!r}: it has no layer of kind {kind.__struct_config__.tag}")
