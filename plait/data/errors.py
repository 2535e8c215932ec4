"""What goes wrong with a user's text or tokenizer, said in one line."""

import difflib
from collections.abc import Iterable


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
