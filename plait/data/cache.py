"""A folder of what many runs share: each entry made once, whole or not at all, however many processes ask for it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from plait.files import naming, sync_folder

Entry = TypeVar("Entry")


def cached(cache: Path, name: str, find: Callable[[Path], Entry | None], make: Callable[[Path], None]) -> Entry:
    """What `find` finds in the folder `name` of `cache`, after `make` has filled it where there was nothing to find."""
    final = cache / name
    entry = find(final)
    if entry is not None:
        return entry
    with naming(final, within=cache):
        (cache / ".lock").mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock" / f"{name}.lock"):  # several processes come here; one of them works
            entry = find(final)
            if entry is not None:
                return entry
            temporary = cache / f".{name}.tmp"
            for stale in (temporary, final):
                shutil.rmtree(stale, ignore_errors=True)
            try:
                temporary.mkdir()
                make(temporary)
                os.replace(temporary, final)
                sync_folder(cache)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            entry = find(final)
            assert entry is not None, final
            return entry
