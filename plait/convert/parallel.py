"""Parallel targets: a new branch beside the teacher's own attention, weighed by a gate that begins at attention.

A converted slot gives 0 of the new branch and 1 of attention (`Sum`, its weights learned), so that the model is the teacher
before training. What comes of the gates is in `plait.convert.gates`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from plait.convert.fit import fitted, plain, unsized
from plait.design.layers import KINDS, Attention, Layer
from plait.design.merges import MERGE_KINDS, Sum
from plait.design.places import Node, ParallelPlace, Place
from plait.design.struct import Struct, convert_kind
from plait.design.surgery import standing

BRANCHES = "branches"
BEGINNING = Sum(fixed=False, branch_norm=False)  # the merge of what is converted, but for where its weights start
Target = Layer | dict[str, Any]  # what takes an attention layer's place: a layer, or branches and their merge


def is_parallel(mixer: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(mixer, Mapping) and BRANCHES in mixer


def is_gated(mixer: Mapping[str, Any]) -> bool:
    """Whether branches are attention and one new mixer, weighed by a gate that is learned and by nothing else."""
    merge = convert_kind(mixer.get("merge") or BEGINNING, MERGE_KINDS, "merge")
    return len(mixer[BRANCHES]) == 2 and isinstance(merge, Sum) and not merge.fixed and not merge.branch_norm


def as_data(mixer: Any, where: str) -> dict[str, Any]:
    """What takes a layer's place, as a file says it, as a mapping with its kind or its branches."""
    return {**mixer} if is_parallel(mixer) else plain(mixer, where)


def target(attention: Attention, mixer: Any, where: str) -> Target:
    """What `mixer` puts in an attention layer's place, every size filled in (`fitted`). Raises ValueError, beginning with
    `where`, for what cannot be there."""
    if not is_parallel(mixer):
        return fitted(attention, mixer, where)
    if unknown := mixer.keys() - {BRANCHES, "merge"}:
        raise ValueError(f"{where}: unknown key {min(unknown)!r} beside branches; known: {BRANCHES}, merge")
    if not isinstance(mixer[BRANCHES], list | tuple):
        raise ValueError(f"{where}: expected a list of branches, got {mixer[BRANCHES]!r}")
    branches = [fitted(attention, branch, where) for branch in mixer[BRANCHES]]
    begins = [float(isinstance(branch, Attention)) for branch in branches]
    if sum(begins) != 1 or len(begins) < 2:
        raise ValueError(
            f"{where}: branches are new mixers beside one attention, at which their gate begins, got "
            f"{' | '.join(_kind(branch) for branch in branches)}; expected such as gated_deltanet | attention"
        )
    merge = mixer.get("merge") or BEGINNING.replace(weights=tuple(begins))
    return {BRANCHES: branches, "merge": merge}


def target_data(attention: Attention, mixer: Any, where: str) -> dict[str, Any]:
    """The same as plain data; what the mixer says of defaults, too."""
    full = target(attention, mixer, where)
    if isinstance(full, Layer):
        return full.to_dict() | plain(mixer)
    pairs = zip(full[BRANCHES], mixer[BRANCHES], strict=True)
    merge = full["merge"]
    return {
        BRANCHES: [branch.to_dict() | plain(said) for branch, said in pairs],
        "merge": merge.to_dict() if isinstance(merge, Struct) else merge,
    }


def standing_for(node: Node, bound: Mapping[str, Layer], where: str) -> dict[str, Any]:
    """A place of a pattern as plain data, letters as they are `bound`, of the sizes that the layer needs in whose place they
    stand. Raises ValueError for branches that a conversion cannot put there."""
    if isinstance(node, Place):
        return unsized(bound[node.letter])
    if node.merge != BEGINNING:
        raise ValueError(f"{where}: this merge does not begin at attention; leave it out, a conversion has its own")
    branches = []
    for branch in node.branches:
        if len(branch) != 1 or not isinstance(branch[0], Place):
            raise ValueError(f"{where}: a branch in attention's place is one mixer; expected such as '[D|A]'")
        layer = bound[branch[0].letter]
        own = isinstance(layer, Attention) and layer.window is None  # the teacher's, whatever it is at this place
        branches.append({"kind": "attention"} if own else unsized(layer))
    return {BRANCHES: branches}


def alone(mixer: Any) -> Any:
    """The new mixer without attention at its side: what rules that choose layers try."""
    branches = mixer[BRANCHES] if is_parallel(mixer) else [mixer]
    return next((branch for branch in branches if KINDS[plain(branch)["kind"]] is not Attention), branches[0])


def new_places(old: Node, new: Node) -> Iterator[Place]:
    """The layers that are new where `old` stood and `new` stands: of a parallel slot all but attention that stayed."""
    for place in standing(new):
        stayed = isinstance(new, ParallelPlace) and isinstance(old, Place) and _same(old.layer, place.layer)
        if not stayed:
            yield place


def _kind(layer: Layer) -> str:
    return str(layer.__struct_config__.tag)


def _same(old: Layer, new: Layer) -> bool:
    return old.replace(wrap=None) == new.replace(wrap=None)
