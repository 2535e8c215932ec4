"""Whole numbers: those that callers give, and powers of two."""

from operator import index
from typing import Any


def whole_number(name: str, value: Any, least: int) -> int:
    """As an int, whatever kind of integer it came in. Raises ValueError for anything else, and below `least`."""
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number, {least} or above, got {value!r}")
    return number


def power_of_two(n: int) -> int:
    """The first that is at least n."""
    return 1 << (n - 1).bit_length()
