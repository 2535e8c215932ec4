"""Where two designs that ought to be one part ways."""

import math
from typing import Any

from plait.design.model import ModelConfig
from plait.design.places import Node, ParallelPlace
from plait.design.struct import Struct

# what training alone asks for, how far a model may be used, what other sizes were once derived by: the same numbers come out
SAME = frozenset({"balance_loss", "z_loss", "max_positions", "expand"})
RATES = frozenset({"bias_rate"})  # how fast something moves; where it is None, that something is not there


def first_difference(ours: ModelConfig, theirs: ModelConfig) -> str | None:
    """The first slot or end of `ours` that is another in `theirs`, and how, in words; None where both compute the same."""
    for mine, other in zip(ours.slots, theirs.slots, strict=False):
        if said := _node(mine, other):
            return said
    if len(ours.slots) != len(theirs.slots):
        return f"{len(ours.slots)} slots: it would have {len(theirs.slots)}"
    for name in ("vocab", "dim", "tied", "norm", "front", "head"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            return _said(f"this {name}", mine, other)
    return None


def _node(mine: Node, other: Node) -> str | None:
    if isinstance(mine, ParallelPlace) and isinstance(other, ParallelPlace):
        if [len(branch) for branch in mine.branches] != [len(branch) for branch in other.branches]:
            return f"{mine.address}: its branches are others"
        pairs = zip(mine.branches, other.branches, strict=True)
        inside = (_node(x, y) for xs, ys in pairs for x, y in zip(xs, ys, strict=True))
        own = (_said(f"{mine.address}", getattr(mine, n), getattr(other, n)) for n in ("merge", "wrap"))
        return next((said for said in (*inside, *own) if said), None)
    if isinstance(mine, ParallelPlace) or isinstance(other, ParallelPlace):
        return f"{mine.address}: it has {'one layer' if isinstance(mine, ParallelPlace) else 'branches'} there"
    return _said(mine.address, mine.layer, other.layer)


def _said(where: str, mine: Any, other: Any) -> str | None:
    """The first field in which two values differ."""
    if _equal(mine, other):
        return None
    if not isinstance(mine, Struct) or type(mine) is not type(other):
        return f"{where}: {_short(mine)}, it would be {_short(other)}"
    for name in mine.__struct_fields__:
        x, y = getattr(mine, name), getattr(other, name)
        if name in SAME or (name in RATES and None not in (x, y)):
            continue
        if said := _said(f"{where}.{name}", x, y):
            return said
    return None


def _equal(mine: Any, other: Any) -> bool:
    """But for float64's last digits: some numbers are kept as one over, or times, others."""
    if isinstance(mine, tuple) and isinstance(other, tuple):
        return len(mine) == len(other) and all(map(_equal, mine, other))
    if isinstance(mine, float) and isinstance(other, float):
        return math.isclose(mine, other, rel_tol=1e-12)
    return mine == other


def _short(value: Any) -> str:
    return str(value.__struct_config__.tag or type(value).__name__) if isinstance(value, Struct) else repr(value)
