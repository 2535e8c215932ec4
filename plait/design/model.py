"""The whole architecture as data: `ModelConfig`."""

import hashlib
import json
import re
from functools import cached_property
from typing import Any, Self

from plait.design import pattern as patterns
from plait.design.ends import FRONT_KINDS, HEAD_KINDS, Logits, Tokens
from plait.design.imports import KEY, asked, is_own, modules_of
from plait.design.layers import LETTERS
from plait.design.merges import MERGE_KINDS, Average
from plait.design.norms import RMSNorm, read_norm
from plait.design.pattern import Chain
from plait.design.places import Node, ParallelPlace, Resolver, layers, nodes, read_layer
from plait.design.spelling import suggest
from plait.design.struct import (
    DERIVED,
    Struct,
    UnknownKind,
    at_most,
    check_keys,
    convert,
    convert_kind,
    non_defaults,
    positive,
)
from plait.design.wrap import PLAIN, Wrap

MAX_DIM = 1_000_000  # fifty times the widest model there is
MAX_VOCAB = 2**31 - 1  # more than any id that token files hold


class ModelConfig(Struct, frozen=True, kw_only=True, tag=False, dict=True):
    """A design: vocabulary size, width, pattern, and what the pattern's letters mean.

    layers: what letters are; those left out have the defaults of `plait.design.layers.LETTERS`, derived from `dim`.
    at: changes to single layers, by address: {"A#5": {"heads": 12}}; "par#0" has a merge and a wrap.
    merge, merges: of every parallel slot whose pattern names none; and merges by name, for "[M|A]:name".
    norm, wrap: the norm used throughout, and how layers sit on the residual stream.
    front, head: what comes in (tokens, or vectors) and what is given (logits, or numbers).
    tie_embeddings: the logits' matrix is the embeddings, where the front is tokens.
    vocab: ids of the tokenizer, or classes; not needed between vectors and a regression head.
    """

    dim: int
    pattern: str
    vocab: int = DERIVED
    layers: dict[str, Any] = {}
    at: dict[str, Any] = {}
    merge: Any = Average()
    merges: dict[str, Any] = {}
    norm: Any = RMSNorm()
    wrap: Any = Wrap()
    front: Any = Tokens()
    head: Any = Logits()
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        at_most(self, "dim", MAX_DIM)
        at_most(self, "vocab", MAX_VOCAB)
        positive(self, "vocab", "dim")
        for name in self.layers:
            if not patterns.is_letter(name):
                raise ValueError(
                    f"layers: {name!r} is no letter of a pattern, which is a capital with lower case behind it, as A and Aw; "
                    "a single layer is changed in `at`"
                )
        own = {letter.name for letter in patterns.letters(self.chain)}  # what is not plait's is written down
        bound = {name: layer for name, layer in LETTERS.items() if name in own and is_own(layer)} | self.layers
        self._set("layers", {name: read_layer(layer, f"layers.{name}") for name, layer in bound.items()})
        self._set("merge", convert_kind(self.merge, MERGE_KINDS, "merge"))
        merges = {name: convert_kind(merge, MERGE_KINDS, f"merges.{name}") for name, merge in self.merges.items()}
        self._set("merges", merges)
        self._set("norm", read_norm(self.norm, "norm"))
        self._set("wrap", convert(self.wrap, Wrap, "wrap"))
        self._set("front", convert_kind(self.front, FRONT_KINDS, "front"))
        self._set("head", convert_kind(self.head, HEAD_KINDS, "head"))
        if self.vocab is None and (isinstance(self.front, Tokens) or isinstance(self.head, Logits)):
            raise ValueError("design: 'vocab' is missing; only a design from vectors to a regression head needs none")
        self._set("at", {address: self._plain(change) for address, change in self.at.items()})
        _ = self.slots  # raises for what does not fit

    @staticmethod
    def _plain(change: Any) -> Any:
        return change.to_dict() if isinstance(change, Struct) else change

    @cached_property
    def chain(self) -> Chain:
        """The parsed pattern."""
        return patterns.parse(self.pattern)

    @cached_property
    def slots(self) -> tuple[Node, ...]:
        """The residual steps in order, each with its layer resolved: a layer, or branches with a merge."""
        return Resolver(self).slots()

    def places(self) -> tuple[str, ...]:
        """The address of every layer and parallel slot, in reading order: "A#0", "par#0", "M#0", ..."""
        return tuple(self._by_address)

    def place(self, address: str) -> Node:
        """What stands at an address. Raises ValueError naming the nearest address that exists."""
        if address not in self._by_address:
            raise ValueError(f"there is no place {address!r}; {nearest_place(address, self._by_address)}")
        return self._by_address[address]

    @cached_property
    def _by_address(self) -> dict[str, Node]:
        return {node.address: node for node in nodes(self.slots)}

    @property
    def full_wrap(self) -> Wrap:
        """The design's wrap with nothing left out."""
        return self.wrap.over(PLAIN.replace(norm=self.norm))

    @property
    def tied(self) -> bool:
        """Whether the head's matrix is the embeddings'."""
        return self.tie_embeddings and isinstance(self.front, Tokens) and isinstance(self.head, Logits)

    @cached_property
    def hash(self) -> str:
        """Equal for designs that build the same model, however they are spelled. Fields at their defaults are left out, so
        that a field that is new changes no hash."""
        ends = {"norm": self.norm, "front": self.front, "head": self.head}
        full = {
            "vocab": self.vocab,
            "dim": self.dim,
            "tied": self.tied,
            "slots": [_identity(node) for node in self.slots],
            **{name: non_defaults(value) for name, value in ends.items()},
        }
        return hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Plain data, as YAML and JSON give it. Raises ValueError naming the field and the nearest right spelling."""
        if not isinstance(data, dict):
            raise ValueError(f"design: expected a mapping, got {data!r}")
        if meant := _of_a_layer(data, {*cls.__struct_fields__, "kind", KEY}):
            raise ValueError(meant)
        check_keys(data, cls, "design", also=(KEY,))
        missing = [name for name in ("dim", "pattern") if name not in data]
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
        modules = modules_of(place.layer for place in layers(self.slots))
        return {KEY: modules} | data if modules else data


def nearest_place(address: str, known: Any) -> str:
    """What to say of an address that is none of `known`."""
    letter = str(address).partition("#")[0]
    same = [place for place in known if place.partition("#")[0] == letter]
    if same:
        return f"{letter!r} goes from {same[0]} to {same[-1]}" if len(same) > 1 else f"the only {letter!r} is {same[0]}"
    return suggest(str(address), known) if len(list(known)) < 12 else f"places: {', '.join(list(known)[:8])}, ..."


def _identity(node: Node) -> Any:
    """What a slot is, without names: letters and merges may be called anything. Shared layers are told by who shares."""
    if isinstance(node, ParallelPlace):
        branches = [[_identity(part) for part in branch] for branch in node.branches]
        return {"merge": non_defaults(node.merge), "branches": branches, "wrap": non_defaults(node.wrap, PLAIN)}
    layer = non_defaults(node.layer.replace(wrap=None)) | {"wrap": non_defaults(node.wrap, PLAIN)}
    return layer | ({"letter": node.letter} if node.layer.shared else {})


def _of_a_layer(data: dict[str, Any], known: set[str]) -> str | None:
    """An error for a key that a layer of the pattern has, and a design does not."""
    drawn = [letter for letter in re.findall("[A-Z][a-z]*", str(data.get("pattern"))) if letter in LETTERS]
    for key in (key for key in data if key not in known):
        for letter in drawn:
            if key in LETTERS[letter].__struct_fields__:
                return f"design: unknown key {key!r}; did you mean 'layers.{letter}.{key}'?"
    return None
