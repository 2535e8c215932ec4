"""The files below a folder, through links, in a stable order and to an end.

A folder is not entered where it already lies on the way down to it: a link to a folder above would repeat for ever.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from plait.files import letters

Above = frozenset[tuple[int, int]]  # the folders on the way down, by device and inode


def files_below(root: Path, left_out: frozenset[str] = frozenset()) -> list[tuple[str, Path]]:
    """(path below `root`, path) of every file; what begins with a dot and folders named in `left_out` are passed over."""
    files = _matching(root, ("**", "*"), _enter(root, frozenset()), left_out)
    return _by_id(root, files)


def files_matching(pattern: Path) -> list[tuple[str, Path]]:
    """(path below the first part with a wildcard, path) of every file that a pattern with `*`, `**`, `?` or `[...]`
    matches. As in a shell, a name that begins with a dot only matches a part that does."""
    first = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    root, parts = Path(*pattern.parts[:first]), pattern.parts[first:]
    if parts[-1] == "**":
        parts = (*parts, "*")
    files = _matching(root, parts, _enter(root, frozenset())) if root.is_dir() else ()
    return _by_id(root, files)


def _by_id(root: Path, files: Iterable[Path]) -> list[tuple[str, Path]]:
    return sorted({letters(path.relative_to(root).as_posix()): path for path in files}.items())


def _matching(
    folder: Path, parts: tuple[str, ...], above: Above | None, left_out: frozenset[str] = frozenset()
) -> Iterator[Path]:
    if above is None:
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from _matching(folder, rest, above, left_out)
        for path in _folders(folder, left_out):
            yield from _matching(path, parts, _enter(path, above), left_out)
    elif rest:
        for path in _named(folder, part):
            if path.is_dir():
                # a folder spelled out was asked for, wherever it leads
                yield from _matching(path, rest, _enter(path, above) if glob.has_magic(part) else above, left_out)
    else:
        yield from (path for path in _named(folder, part) if path.is_file())


def _enter(folder: Path, above: Above) -> Above | None:
    stat = folder.stat()
    here = (stat.st_dev, stat.st_ino)
    return None if here in above else above | {here}


def _folders(folder: Path, left_out: frozenset[str]) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_symlink() or entry.is_dir()]
    inside = (folder / name for name in names if not name.startswith(".") and name not in left_out)
    return (path for path in inside if path.is_dir())


def _named(folder: Path, part: str) -> Iterator[Path]:
    if not glob.has_magic(part):
        return iter([folder / part])
    hidden = part.startswith(".")
    return (folder / name for name in os.listdir(folder) if fnmatch(name, part) and name.startswith(".") == hidden)
