"""The whole architecture as data: `ModelConfig`."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import msgspec

from plait.design import pattern as patterns
from plait.design.imports import KEY, OWN, asked, is_own, modules_of
from plait.design.layers import KINDS, LETTERS, Layer
from plait.design.merges import MERGE_KINDS, Average, Merge
from plait.design.pattern import Chain, Item, Letter, Parallel, PatternError
from plait.design.struct import Struct, UnknownKind, at_most, check_keys, convert, convert_kind, positive

MAX_DIM = 1_000_000  # fifty times the widest model there is
MAX_VOCAB = 2**31 - 1  # more than any id that token files hold


class RMSNorm(Struct, frozen=True, kw_only=True, tag=False):
    """x / rms(x) times w (arXiv 1910.07467); `zero_centered`: times 1 + w with w starting at 0 (Gemma, Qwen3-Next)."""

    eps: float = 1e-6
    zero_centered: bool = False

    def __post_init__(self) -> None:
        positive(self, "eps")


@dataclass(frozen=True, slots=True)
class Slot:
    """One residual step of the model. `address` is how tables, plans and reports name it: "A#2" is the third A."""

    index: int
    address: str
    item: Item

    @property
    def text(self) -> str:
        return patterns.render((self.item,))


class ModelConfig(Struct, frozen=True, kw_only=True, tag=False, dict=True):
    """A design: vocabulary size, width, pattern, and what the pattern's letters mean.

    Letters that `layers` leaves out have the defaults of `plait.design.layers.LETTERS`, derived from `dim`.
    `merge` is used by every parallel slot whose pattern names none.
    """

    vocab: int
    dim: int
    pattern: str
    layers: dict[str, Any] = {}
    merge: Any = Average()
    norm: Any = RMSNorm()
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        at_most(self, "dim", MAX_DIM)
        at_most(self, "vocab", MAX_VOCAB)
        positive(self, "vocab", "dim")
        own = {letter.name for letter in patterns.letters(self.chain)}  # what is not plait's is written down
        told = {name: layer for name, layer in LETTERS.items() if name in own and is_own(layer)} | self.layers
        layers = {name: convert_kind(layer, KINDS, f"layers.{name}", OWN) for name, layer in told.items()}
        msgspec.structs.force_setattr(self, "layers", layers)
        msgspec.structs.force_setattr(self, "merge", convert_kind(self.merge, MERGE_KINDS, "merge"))
        msgspec.structs.force_setattr(self, "norm", convert(self.norm, RMSNorm, "norm"))
        for letter in patterns.letters(self.chain):
            self._resolve(letter)

    def _resolve(self, letter: Letter) -> Layer:
        known = LETTERS | self.layers
        if letter.name not in known:
            described = {name: f"{name} ({type(layer).__name__})" for name, layer in known.items()}
            raise PatternError(
                self.pattern,
                letter.column,
                f"no layer is bound to {letter.name!r}; bind it in `layers`, or use one of "
                f"{', '.join(described.values())}{OWN}",
            )
        try:
            return known[letter.name].resolve(self.dim)
        except ValueError as error:
            raise ValueError(f"layer {letter.name!r}: {error}") from None

    @cached_property
    def chain(self) -> Chain:
        """The parsed pattern."""
        return patterns.parse(self.pattern)

    @cached_property
    def bound(self) -> dict[str, Layer]:
        """Every letter of the pattern with its layer, all numbers filled in."""
        return {letter.name: self._resolve(letter) for letter in patterns.letters(self.chain)}

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The residual steps in order."""
        seen: Counter[str] = Counter()
        slots = []
        for index, item in enumerate(self.chain):
            name = patterns.render((item,))
            slots.append(Slot(index, f"{name}#{seen[name]}", item))
            seen[name] += 1
            if isinstance(item, Parallel):  # an A inside a branch counts as an A
                seen.update(letter.name for letter in patterns.letters((item,)))
        return tuple(slots)

    def merge_of(self, item: Parallel) -> Merge:
        """The merge of one parallel slot: the design's where the pattern names none or names the same kind."""
        if item.merge is None or type(self.merge) is MERGE_KINDS[item.merge]:
            return self.merge
        return MERGE_KINDS[item.merge]()

    @cached_property
    def hash(self) -> str:
        """Equal for designs that build the same model, however they are spelled."""
        full = {
            "vocab": self.vocab,
            "dim": self.dim,
            "pattern": patterns.render(self.chain),
            "layers": {name: full_dict(layer) for name, layer in sorted(self.bound.items())},
            "merge": full_dict(self.merge),
            "norm": full_dict(self.norm),
            "tie_embeddings": self.tie_embeddings,
        }
        return hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Plain data, as YAML and JSON give it. Raises ValueError naming the field and the nearest right spelling."""
        if not isinstance(data, dict):
            raise ValueError(f"design: expected a mapping, got {data!r}")
        check_keys(data, cls, "design", also=(KEY,))
        missing = [name for name in ("vocab", "dim", "pattern") if name not in data]
        if missing:
            raise ValueError(f"design: {missing[0]!r} is missing; a design needs vocab, dim and pattern")
        try:
            return convert({key: value for key, value in data.items() if key != KEY}, cls, "design")
        except UnknownKind as error:
            raise error.from_modules(asked(data)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        data = super().to_dict()
        if set(data.get("merge", ())) == {"kind"}:
            data["merge"] = data["merge"]["kind"]
        modules = modules_of(self.bound.values())
        return {KEY: modules} | data if modules else data


def full_dict(config: Struct) -> dict[str, Any]:
    """All fields that say what is built, defaults included, so that the hash does not depend on what was spelled out."""
    values = {name: getattr(config, name) for name in config.__struct_fields__ if name not in config.only_how}
    plain = {name: full_dict(value) if isinstance(value, Struct) else value for name, value in values.items()}
    return {"kind": type(config).__name__} | plain
