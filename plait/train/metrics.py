"""The record of a run: one JSON object a line, for each step and each evaluation."""

import json
import os
from pathlib import Path
from typing import Any, Protocol, Self

from plait.files import json_text, read_text, write_text


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records up to `last_step`. A last line that a killed run did not finish is left out."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(read_text(path).splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number}: not JSON; mend or remove the file") from None
        if last_step is None or record["step"] <= last_step:
            records.append(record)
    return records


class Log(Protocol):
    """Where records go."""

    def write(self, **record: Any) -> None: ...

    def sync(self) -> None:
        """Force what was written to disk."""
        ...


class NoLog:
    """Of ranks that write nothing."""

    def write(self, **record: Any) -> None:
        pass

    def sync(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class MetricsLog:
    """Appends records. What an earlier run wrote past `last_step`, where this one goes on, is dropped first."""

    def __init__(self, path: Path, last_step: int):
        kept = "".join(json_text(record) + "\n" for record in read_metrics(path, last_step))
        write_text(path, kept)
        self._file = path.open("ab", buffering=0)  # nothing is left to write when closing after a full disk

    def write(self, **record: Any) -> None:
        try:
            self._file.write((json_text(record) + "\n").encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None

    def sync(self) -> None:
        """Force what was written to disk: a checkpoint counts on the records before it."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
