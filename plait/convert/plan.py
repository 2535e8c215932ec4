"""What a conversion does to a teacher, as a file that a person can read and edit."""

import hashlib
from pathlib import Path
from typing import Any, Self

import torch

from plait.convert.parallel import Target, as_data, is_parallel, target, target_data
from plait.design.layers import Attention
from plait.design.load import read_mapping
from plait.design.model import ModelConfig
from plait.design.places import layers
from plait.design.struct import Struct, between, convert
from plait.design.yaml_core import write_yaml
from plait.files import write_text
from plait.model.files import stored
from plait.model.language_model import LanguageModel
from plait.model.lora import weights_hash


class Cost(Struct, frozen=True, kw_only=True, tag=False):
    """What it took to know the scores: tokens that any model read, and seconds."""

    tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        between(self, 0, 2**53, "tokens", "seconds")


class Plan(Struct, frozen=True, kw_only=True, tag=False):
    """teacher: what `plait.load` takes; teacher_hash: of its design and weights (`teacher_hash`).

    replace: by address in the teacher, the layer that takes an attention layer's place, as plain data; sizes left out are those
    that the attention layer's weights need; or `branches`, attention one of them, and their merge.

    keep: addresses of the attention layers that stay. rule: what chose them; scores: by address, higher where attention is
    needed more; cost: of these. seed: of weights that nothing is carried over to.
    """

    teacher: str
    teacher_hash: str
    replace: dict[str, Any]
    keep: tuple[str, ...] = ()
    rule: str = "list"
    scores: dict[str, float] = {}
    cost: Cost = Cost()
    seed: int = 0

    def __post_init__(self) -> None:
        self._set("replace", {address: as_data(mixer, f"plan: {address}") for address, mixer in self.replace.items()})

    @classmethod
    def of(cls, teacher: LanguageModel, name: str, replace: dict[str, Any], **rest: Any) -> Self:
        """A checked plan for a model that was loaded from `name`; `replace` with every size filled in, `keep` the others."""
        places = attention_places(teacher.design)
        full = {}
        for address, mixer in replace.items():
            _attention(places, teacher.design, address)
            full[address] = target_data(places[address], mixer, f"plan: {address}")
        keep = tuple(address for address in places if address not in full)
        plan = cls(teacher=name, teacher_hash=teacher_hash(teacher), replace=full, keep=keep, **rest)
        plan.check(teacher)
        return plan

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ValueError naming the field that is wrong."""
        return convert(read_mapping(path), cls, str(path))

    @property
    def words(self) -> str:
        """What becomes of the teacher's attention."""
        beside = sum(map(is_parallel, self.replace.values()))
        gone, of = len(self.replace) - beside, len(self.keep) + len(self.replace)
        parts = [f"stays at {', '.join(self.keep)}"] if self.keep else []
        parts += [f"is replaced in {gone} of {of} layers"] if gone else []
        parts += [f"gets a branch beside it in {beside} of {of} layers"] if beside else []
        return "attention " + ", ".join(parts)

    def write(self, path: Path) -> None:
        """As YAML, the old file or the whole new one."""
        write_text(path, write_yaml(self.to_dict()))

    def check(self, teacher: LanguageModel) -> None:
        """Raise ValueError for another teacher, an address that holds no attention there, and a layer that cannot take its
        weights."""
        if teacher_hash(teacher) != self.teacher_hash:
            raise ValueError(
                f"plan: made for other weights than these of {self.teacher} ({self.teacher_hash}); make a new plan, or load "
                "the teacher that it was made for"
            )
        if not self.replace:
            raise ValueError(
                "plan: it replaces no layer, so there is nothing to convert; move an address from keep to replace"
            )
        self.layers(teacher.design)
        places = attention_places(teacher.design)
        for address in self.keep:
            _attention(places, teacher.design, address)
        if twice := [address for i, address in enumerate(self.keep) if address in self.keep[:i]]:
            raise ValueError(f"plan: {twice[0]} is kept twice; name it once")
        left = [address for address in places if address not in self.keep and address not in self.replace]
        both = [address for address in self.keep if address in self.replace]
        if left or both:
            said = "neither kept nor replaced" if left else "kept and replaced"
            raise ValueError(f"plan: {(left or both)[0]} is {said}; every attention layer is one of the two")

    def layers(self, design: ModelConfig) -> dict[str, Target]:
        """What stands at each replaced address, sizes filled in."""
        places = attention_places(design)
        for address in self.replace:
            _attention(places, design, address)
        return {address: target(places[address], mixer, f"plan: {address}") for address, mixer in self.replace.items()}


def attention_places(design: ModelConfig) -> dict[str, Attention]:
    """The attention layers of a design by address, in order."""
    return {place.address: place.layer for place in layers(design.slots) if isinstance(place.layer, Attention)}


def teacher_hash(teacher: LanguageModel) -> str:
    """Of design and weights, whether these were loaded in float32 or in a narrower dtype that they were stored in."""
    digest = hashlib.sha256()
    for name, x in sorted(stored(teacher).items()):
        digest.update(weights_hash({name: x.to(torch.promote_types(x.dtype, torch.float32))}).encode())
    return f"{teacher.design.hash}-{digest.hexdigest()[:16]}"


def _attention(places: dict[str, Attention], design: ModelConfig, address: str) -> Attention:
    if address in places:
        return places[address]
    node = design.place(address)  # raises for an address that does not exist
    kind = getattr(getattr(node, "layer", None), "__struct_config__", None)
    raise ValueError(f"plan: {address} is {kind.tag if kind else 'a parallel slot'} already, not attention")
