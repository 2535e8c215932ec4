"""The pattern language: the order of a model's layers as one string.

    pattern  = item+                       left to right; spaces are free
    item     = atom count?                 "M3" = "MMM"
    atom     = LETTER                      a capital, may go on in lower case: M, A, Aw
             | "(" pattern ")"             "(MF)3 AF" is MF MF MF AF
             | "[" pattern ("|" pattern)+ "]" merge?     branches side by side
    merge    = ":" NAME                    "[M|A]:gated"
    count    = integer >= 1

A parsed pattern is a plain tuple of slots, groups and counts written out: `parse` and `render` are inverse on it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_SLOTS = 10_000  # letters in all; a typing slip such as "A99999999" should be an error, not an hour of building
MAX_DEPTH = 64  # brackets inside each other; modules nested some hundred deep are more than Python can call or copy

_LETTER = re.compile(r"[A-Z][a-z]*")
_NAME = re.compile(r"[a-z_]+")
_COUNT = re.compile(r"[0-9]+")
_GOES_ON = re.compile(r"[._,'][0-9]|[a-z]")  # what makes a number of digits no count: 1.5, 1e9
_SIGNED = re.compile(r"[-+*^.x×]\s*[0-9]")  # -1, *3


class PatternError(ValueError):
    """A pattern that cannot be read; `column` counts from 1."""

    def __init__(self, text: str, column: int, reason: str):
        near = text if len(text) <= 80 else f"...{text[max(0, column - 30) : column + 30]}..."
        super().__init__(f"pattern {near!r}, column {column}: {reason}")
        self.column = column


@dataclass(frozen=True, slots=True)
class Letter:
    """One sublayer, named by its letter."""

    name: str
    column: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Parallel:
    """Branches that read the same normed input; each branch is a chain of slots."""

    branches: tuple["Chain", ...]
    merge: str | None = None
    column: int = field(default=0, compare=False)
    merge_column: int = field(default=0, compare=False)


Item = Letter | Parallel
Chain = tuple[Item, ...]


def parse(text: str) -> Chain:
    """Read a pattern. Raises `PatternError` with the column and what would be right."""
    if not isinstance(text, str):
        raise ValueError(f"pattern: expected a string such as '(MF)3 AF', got {text!r}")
    try:
        chain, end = _Reader(text).chain(0, closers="")
    except RecursionError:
        raise PatternError(text[:40] + "...", 1, "brackets nested too deeply to read") from None
    assert end == len(text)
    return chain


def is_letter(name: str) -> bool:
    """Whether a pattern can name a layer so."""
    return _LETTER.fullmatch(name) is not None


def letters(chain: Chain) -> Iterator[Letter]:
    """Every letter, left to right, branches included."""
    for item in chain:
        if isinstance(item, Letter):
            yield item
        else:
            for branch in item.branches:
                yield from letters(branch)


class _Reader:
    """Recursive descent; each method takes a position and gives what it read and the position after it."""

    def __init__(self, text: str):
        self.text, self.depth = text, 0

    def error(self, at: int, reason: str) -> PatternError:
        return PatternError(self.text, at + 1, reason)

    def skip(self, at: int) -> int:
        while at < len(self.text) and self.text[at].isspace():
            at += 1
        return at

    def peek(self, at: int) -> str:
        return self.text[at] if at < len(self.text) else ""

    def chain(self, at: int, closers: str) -> tuple[Chain, int]:
        items: list[Item] = []
        letters = 0
        at = self.skip(at)
        while at < len(self.text) and self.text[at] not in closers:
            unit, after = self.atom(at)
            times, after = self.count(after)
            letters += times * _size(unit)
            if letters > MAX_SLOTS:
                raise self.error(at, f"more than {MAX_SLOTS:,} layers; write a smaller count")
            items.extend(unit * times)
            at = self.skip(after)
        if not items:
            raise self.error(at, "expected a letter such as A or M, '(' or '['")
        return tuple(items), at

    def atom(self, at: int) -> tuple[Chain, int]:
        char = self.peek(at)
        if match := _LETTER.match(self.text, at):
            return (Letter(match.group(), at + 1),), match.end()
        if char == "(":
            chain, end = self.chain(at + 1, closers=")]|")
            return chain, self.closed(end, ")", at)
        if char == "[":
            return self.parallel(at)
        if char in ")]|":
            opener = {")": "'('", "]": "'['", "|": "'['"}[char]
            raise self.error(at, f"{char!r} without {opener} before it")
        if char.isdigit():
            raise self.error(at, f"a count must follow a letter or a group, as in 'M{char}'")
        if char.isalpha() and char.upper() != char and char.isascii():
            raise self.error(at, f"letters start with a capital: did you mean {char.upper()!r}?")
        raise self.error(at, f"unexpected {char!r}; expected a letter, '(' or '['")

    def closed(self, at: int, closer: str, opened: int) -> int:
        if self.peek(at) != closer:
            found = f"found {self.peek(at)!r}, " if self.peek(at) else ""
            opener = {")": "(", "]": "["}[closer]
            raise self.error(at, f"{found}missing {closer!r} for the {opener!r} in column {opened + 1}")
        return at + 1

    def parallel(self, opened: int) -> tuple[Chain, int]:
        branches, at = [], opened
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(opened, f"more than {MAX_DEPTH} parallel slots inside each other")
        while True:
            branch, at = self.chain(at + 1, closers="|])")
            branches.append(branch)
            if self.peek(at) != "|":
                break
        at, self.depth = self.closed(at, "]", opened), self.depth - 1
        if len(branches) < 2:
            raise self.error(at - 1, "one branch alone is not parallel: write '[M|A]', or drop the brackets")
        merge, start, at = self.merge(at)
        return (Parallel(tuple(branches), merge, opened + 1, start + 1),), at

    def merge(self, at: int) -> tuple[str | None, int, int]:
        """The name, where it begins, and the position after it."""
        colon = self.skip(at)
        if self.peek(colon) != ":":
            return None, at, at
        start = self.skip(colon + 1)
        match = _NAME.match(self.text, start)  # "[M|A]:sum AF" and "[M|A]:sumAF" both end the name at the capital
        if not match:
            raise self.error(start, "expected the name of a merge after ':', in lower case, as in '[M|A]:gated'")
        return match.group(), start, match.end()

    def count(self, at: int) -> tuple[int, int]:
        start = self.skip(at)
        match = _COUNT.match(self.text, start)
        end = match.end() if match else start
        odd = _GOES_ON.match(self.text, end) if match else _SIGNED.match(self.text, start)
        if odd or (self.peek(end).isdigit() and not self.peek(end).isascii()):
            raise self.error(start, f"a count is a whole number from 1 to {MAX_SLOTS:,}, as in 'M3' or '(AF)3'")
        if not match:
            return 1, at
        digits = match.group().lstrip("0")
        if not digits:
            raise self.error(start, "a count is at least 1; leave the letter out instead")
        return (int(digits) if len(digits) < 10 else MAX_SLOTS + 1), end


def _size(chain: Chain) -> int:
    """How many letters there are, branches included."""
    return sum(1 if isinstance(item, Letter) else sum(map(_size, item.branches)) for item in chain)


def render(chain: Chain) -> str:
    """A short spelling of a parsed pattern: runs become counts and repeated stretches become groups."""
    words: list[str] = []
    at = 0
    while at < len(chain):
        period, times = _best_repeat(chain, at)
        unit = chain[at : at + period]
        if period > 1 and times > 1:
            words.append(f"({render(unit)}){times} ")
        else:
            words.append(_render_item(unit[0]) + (f"{times} " if times > 1 else ""))
        at += period * times
    return "".join(words).strip()


def _render_item(item: Item) -> str:
    if isinstance(item, Letter):
        return item.name
    branches = "|".join(render(branch) for branch in item.branches)
    return f"[{branches}]" + (f":{item.merge} " if item.merge else "")


def _best_repeat(chain: Chain, at: int) -> tuple[int, int]:
    """(period, times) at `at` that covers the most slots; periods past 256 do not occur in hand-written patterns."""
    best = (1, 1)
    for period in range(1, min(256, (len(chain) - at) // 2) + 1):
        unit, times = chain[at : at + period], 1
        while chain[at + times * period : at + (times + 1) * period] == unit:
            times += 1
        if times > 1 and period * (times - 1) > best[0] * (best[1] - 1):
            best = (period, times)
    return best
