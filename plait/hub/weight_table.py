"""Between another library's tensors and ours: which rows of which tensor lie where, as data, read in both directions.

A family says for each module of a slot, under our name, where its weights lie under theirs (`Rules`); `table` turns that and
the design's declared weights into one `Piece` per run of rows. `fill` reads one of their tensors by it and `made` makes one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from plait.design.weights import Weight


@dataclass(frozen=True, slots=True)
class Form:
    """How their rows (n, ...) become ours, and ours theirs: two functions that undo each other to the bit, unless it is not
    `exact`; what is made of ours then is as wide as ours, whatever it was read from.

    refusal: why their tensor cannot be made of such rows of ours, in words; None where it can.
    """

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]
    exact: bool = True
    refusal: Callable[[Tensor], str | None] | None = None


SAME = Form(lambda x: x, lambda x: x)
NOTHING: Mapping[str, int] = {}
CONV = Form(lambda x: x.squeeze(1), lambda x: x.unsqueeze(1))  # (channels, 1, width) and (channels, width)


@dataclass(frozen=True, slots=True)
class Rows:
    """Their tensor `name` holds these `parts` of ours, in this order, all of it where none is named.

    groups: it does so group by group, each with its share of every part: q and gate of the first head, then of the second.
    both: and so does ours. chunk: it holds chunk i of n of all rows, as torch.chunk cuts them, whatever they are.
    share: they are run i of n equal ones that it holds, once in our form; the others are of other weights.
    A name may have "{part}", for a tensor each, and "{expert}", for the matrices of a stack.
    """

    name: str
    parts: tuple[str, ...] = ()
    groups: int = 1
    both: bool = False
    form: Form = SAME
    chunk: tuple[int, int] | None = None
    share: tuple[int, int] = (0, 1)


Place = str | Rows | tuple[Rows, ...]


@dataclass(frozen=True, slots=True)
class Either:
    """Places of which files have one or another: the first one whose tensor is in the file and as large as it says; written as
    it was read, or as the first."""

    places: tuple[Place, ...]


# By the path of a module or weight in a slot: "mixer.qkv_proj". A path of several, joined by " + ", is of weights that their
# tensor holds beside each other.
Rule = Place | Either
Rules = Mapping[str, Rule]


@dataclass(frozen=True, slots=True)
class Piece:
    """`size` rows from `start` of each of `groups` equal groups of their tensor are our rows from `at`, which are together or,
    where there are `ours_groups`, lie in groups too.

    index: of which matrix of a stack. total: rows of theirs. shape: of one row.
    """

    theirs: str
    ours: str
    at: int
    size: int
    start: int
    total: int
    shape: tuple[int, ...]
    groups: int
    ours_groups: int
    index: int | None
    form: Form

    @property
    def numel(self) -> int:
        """Of all of their tensor."""
        return self.total * prod(self.shape)

    def target(self, ours: Tensor) -> Tensor:
        """The rows of ours, as a view (groups, size, ...)."""
        matrix = ours if self.index is None else ours[self.index]
        if self.ours_groups > 1:
            return matrix.view(self.ours_groups, -1, *self.shape).narrow(1, self.at, self.size)
        return matrix.view(-1, *self.shape).narrow(0, self.at, self.groups * self.size).unflatten(0, (self.groups, -1))

    def source(self, theirs: Tensor) -> Tensor:
        """The same rows of theirs, once in our form, as a view (groups, size, ...)."""
        return theirs.view(self.groups, -1, *self.shape).narrow(1, self.start, self.size)


def table(
    weights: Iterable[Weight], rules: Rules, ours: str = "", theirs: str = "", known: Mapping[str, int] = NOTHING
) -> Iterator[Piece]:
    """The pieces of the weights whose names begin with `ours`, by rules whose names are inside `theirs`. known: the
    tensors that there are, and how many numbers they hold, where a rule is `Either`. Raises KeyError for a weight that no rule
    is about."""
    left = {weight.name.removeprefix(ours): weight for weight in weights if weight.name.startswith(ours)}
    for path, rule in rules.items():
        for leaf in ("", ".weight", ".bias"):
            together = [left.pop(f"{name}{leaf}") for name in path.split(" + ") if f"{name}{leaf}" in left]
            if together:
                yield from _ruled(together, rule, theirs, leaf, known)
    if left:
        raise KeyError(f"no rule says where {ours}{next(iter(left))} lies")


def _ruled(together: list[Weight], rule: Rule, inside: str, leaf: str, known: Mapping[str, int]) -> list[Piece]:
    """Those of the weights that one rule is about."""
    choices = []
    for place in rule.places if isinstance(rule, Either) else (rule,):
        parts = place if isinstance(place, tuple) else (place,)
        named = (Rows(rows) if isinstance(rows, str) else rows for rows in parts)
        choices.append([piece for rows in named for piece in _pieces(together, rows, inside, leaf)])
        if choices[-1] and choices[-1][0].numel == known.get(choices[-1][0].theirs):
            return choices[-1]
    return choices[0]


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows of one of our weights, by the name they have in it."""

    part: str
    weight: Weight
    at: int
    size: int


def _pieces(together: list[Weight], rows: Rows, inside: str, leaf: str) -> Iterator[Piece]:
    """Those of the weights that one `Rows` is about: of one weight, or of several that it holds beside each other."""
    each = "{expert}" in rows.name
    runs = [run for weight in together for run in _runs(weight, rows.parts, each)]
    if rows.chunk is not None:
        runs = [_chunk(together[0], *rows.chunk)]
    name = f"{inside}{rows.name}{leaf}"
    for index in range(together[0].shape[0]) if each else (None,):
        here = name.replace("{expert}", str(index))
        if "{part}" in name:
            for run in runs:
                yield _piece(here.replace("{part}", run.part), run, 0, run.size, rows, index)
        else:
            held, (nth, count) = sum(run.size for run in runs), rows.share
            start = nth * held
            for run in runs:
                yield _piece(here, run, start, count * held, rows, index)
                start += run.size // rows.groups


def _chunk(weight: Weight, index: int, count: int) -> _Run:
    rows = weight.shape[0]
    size = -(-rows // count)
    return _Run("", weight, index * size, min(size, rows - index * size))


def _piece(theirs: str, run: _Run, start: int, total: int, rows: Rows, index: int | None) -> Piece:
    groups, inner = rows.groups, rows.groups if rows.both else 1
    shape = run.weight.shape[-1:] if len(run.weight.shape) > 1 else ()
    form = _form(run.weight, index) if rows.form is SAME else rows.form
    size, at = run.size // groups, run.at // inner
    return Piece(theirs, run.weight.name, at, size, start, total, shape, groups, inner, index, form)


def _form(weight: Weight, index: int | None) -> Form:
    if weight.role == "conv" and len(weight.shape) == 2:
        return CONV
    stacked = weight.role == "experts" and index is None
    return Form(lambda x: x.flatten(0, 1), lambda x: x.unflatten(0, (weight.shape[0], -1))) if stacked else SAME


def _runs(weight: Weight, parts: tuple[str, ...], each: bool) -> Iterator[_Run]:
    """The named parts of a weight in this order, without names all of it; of `each` matrix of a stack alone."""
    where: dict[str, tuple[int, int]] = {}
    for part, size in weight.parts if each or weight.role != "experts" else ():
        where[part] = sum(size for _, size in where.values()), size
    if not where:
        shape = weight.shape[1:] if each else weight.shape
        yield _Run("", weight, 0, prod(shape[:-1]) if len(shape) > 1 else sum(shape))
    for part in parts or where:
        if part in where:  # a bias may be on some parts alone
            yield _Run(part, weight, *where[part])


def by_theirs(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """The pieces of each of their tensors, in order."""
    named: dict[str, list[Piece]] = {}
    for piece in pieces:
        named.setdefault(piece.theirs, []).append(piece)
    return named


def torn(pieces: Iterable[Piece], ours: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Two of our weights that lie in one place of theirs, norms of a shared block's uses, and are not what they should be:
    equal."""
    first: dict[tuple[str, int, int | None], Piece] = {}
    for piece in pieces:
        other = first.setdefault((piece.theirs, piece.start, piece.index), piece)
        if other is not piece and not torch.equal(other.target(ours[other.ours]), piece.target(ours[piece.ours])):
            return other.ours, piece.ours
    return None


def made(pieces: list[Piece], ours: Mapping[str, Tensor]) -> Tensor:
    """One of their tensors, of its pieces; on the device "meta" where ours are, without values."""
    first, example = pieces[0], ours[pieces[0].ours]
    if len(pieces) == 1 and first.form is SAME and example.numel() == first.total * prod(first.shape):
        return example.reshape(first.total, *first.shape)
    return first.form.write(_gathered(pieces, ours))


def refusal(pieces: list[Piece], ours: Mapping[str, Tensor]) -> str | None:
    """Why one of their tensors cannot be made, in words."""
    why = pieces[0].form.refusal
    return None if why is None else why(_gathered(pieces, ours))


def _gathered(pieces: list[Piece], ours: Mapping[str, Tensor]) -> Tensor:
    """The rows of one of their tensors, still in our form."""
    first, example = pieces[0], ours[pieces[0].ours]
    rows = torch.empty((first.total, *first.shape), dtype=example.dtype, device=example.device)
    for piece in pieces:
        piece.source(rows).copy_(piece.target(ours[piece.ours]))
    return rows


def fill(pieces: list[Piece], theirs: Tensor, ours: Mapping[str, Tensor]) -> None:
    """Copy one of their tensors to where its pieces lie in ours."""
    rows = pieces[0].form.read(theirs).contiguous().view(pieces[0].total, *pieces[0].shape)
    for piece in pieces:
        piece.target(ours[piece.ours]).copy_(piece.source(rows))
