"""What goes wrong with a user's text, tokenizer or numbers, said in one line."""

import difflib
import operator
from collections.abc import Iterable
from typing import Any


class DataError(ValueError):
    """Text, tokenizer or shards that cannot be used as given; the message says what was expected."""


class NotFound(DataError, FileNotFoundError):
    """A source or tokenizer that does not exist; the message names the nearest spelling that does."""

    def __str__(self) -> str:
        return str(self.args[0])


class NotText(DataError):
    """A file that is not UTF-8 text."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or an empty string where nothing is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def whole_number(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int; raises DataError unless it is a whole number from `low` to `high`. A bool is none."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise DataError(f"{name}={repr(value)[:60]}: expected a whole number of at least {low}")
    shown = str(number) if number.bit_length() < 200 else f"(a number of {number.bit_length()} bits)"
    if number < low:
        raise DataError(f"{name}={shown}: expected at least {low}")
    if high is not None and number > high:
        raise DataError(f"{name}={shown}: expected at most {high}")
    return number
