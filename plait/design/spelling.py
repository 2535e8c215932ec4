"""Errors that name the nearest right spelling."""

from collections.abc import Iterable
from difflib import get_close_matches


def suggest(wrong: str, known: Iterable[str]) -> str:
    """`"did you mean 'heads'?"` where one of `known` is near, else the whole list of what exists."""
    known = sorted(known)
    near = get_close_matches(wrong, known, n=1, cutoff=0.5)
    near = near or [name for name in known if name.lower() == wrong.lower()]
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
