"""The hashes of files' contents, remembered between runs so that an unchanged file is not read again to know it."""

import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from plait.files import write_text

# A file written this recently may be written again within the same tick of its file system's clock (FAT's: 2 s).
SETTLED = 2_500_000_000  # ns


def content_hashes(paths: Iterable[Path], memory: Path | None = None) -> list[str]:
    """One digest a file, in order. `memory`: a JSON file of what was known before, brought up to date where it can be
    written; it is only ever a saving, so a damaged one is no error."""
    known = _read(memory)
    now, digests = {}, []
    for path in paths:
        name, mark, settled = str(path.absolute()), _mark(path), time.time_ns() - SETTLED
        entry = known.get(name)
        if entry is None or entry[0] != mark:
            entry = [mark, _hash(path)]
        if max(mark[1:3]) < settled:
            now[name] = entry
        digests.append(entry[1])
    if memory is not None and now != known:
        _remember(memory, now)
    return digests


def _mark(path: Path) -> list[int]:
    """What changes when a file is written: also its change time, which no tool sets back."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:64]


def _read(memory: Path | None) -> dict[str, list]:
    try:
        known = json.loads(memory.read_bytes()) if memory else {}
        return {name: [list(mark), str(digest)] for name, (mark, digest) in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(memory: Path, known: dict[str, list]) -> None:
    with suppress(OSError):
        write_text(memory, json.dumps(known))
