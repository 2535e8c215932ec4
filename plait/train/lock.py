"""One process at a time in a run's folder: two would write one metrics.jsonl and remove each other's checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = "lock"


@contextmanager
def alone_in(folder: Path, what: str = "another run") -> Iterator[None]:
    """Hold `folder`, which is made. Raises ValueError where `what`, a living process, holds it.

    The system keeps the lock, on an open file: it ends with the process, however that ends, and the file's mere presence
    means nothing. A folder in which nothing else came to be is taken away again.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{folder}: {what} is going on here; wait for its end, or give another folder") from None
    try:
        yield
    finally:
        # Windows deletes no open file; elsewhere who has opened this one finds it gone, and waits anew
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                for path in created:
                    path.rmdir()  # which fails where something else came to be
        lock.release()
