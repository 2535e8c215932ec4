"""Where text comes from: a source is a spec that iterates documents lazily, each with a stable id.

| spec | documents |
|---|---|
| `stdlib` | the Python standard library's own source on this machine |
| `book.txt` | one file, one document |
| `folder` | every text file below it; hidden, binary and empty ones are passed over and counted |
| `data/**/*.md` | every file that matches |
| `x.jsonl:field` | one record a document (`:field` may be left out: `text`); also for a folder or a glob |
| `x.parquet:field` | the same; needs the `datasets` extra |
| `hf:NAME_OR_PATH[@CONFIG][:field]` | the training split of a Hugging Face dataset; needs the `datasets` extra |

No torch and no numpy here.
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from plait.data.errors import DataError, NotFound, NotText, nearest
from plait.data.records import dataset_texts, extra, jsonl_texts, parquet_texts
from plait.data.text import cut_pieces, read_pieces

EXPECTED = "stdlib, a text file, a folder, a glob, x.jsonl:field, x.parquet:field or hf:NAME"
RECORDS = {".jsonl": jsonl_texts, ".ndjson": jsonl_texts, ".parquet": parquet_texts}
FIELD = "text"
# Tests quote broken source on purpose; encodings are generated character tables; the rest is not the library's own.
STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})


@dataclass(frozen=True, slots=True)
class Document:
    """`pieces` together are the text and can be iterated once. `required`: named by the user, so never passed over."""

    id: str
    pieces: Iterable[str]
    required: bool = False


class Source(Protocol):
    """Documents in a stable order; `total_bytes` is None where it cannot be known before reading."""

    @property
    def spec(self) -> str: ...

    @property
    def total_bytes(self) -> int | None: ...

    def identity(self) -> str:
        """A hash that changes when the documents may have changed."""
        ...

    def documents(self) -> Iterator[Document]: ...


@dataclass(frozen=True, slots=True)
class FileSource:
    """Files by (id, path), in order. `named`: the spec is this one file."""

    spec: str
    files: tuple[tuple[str, Path], ...]
    field: str | None = None
    named: bool = False

    @property
    def total_bytes(self) -> int | None:
        if any(path.suffix == ".parquet" for _, path in self.files):
            return None  # compressed, so its size says nothing of the text's
        return sum(path.stat().st_size for _, path in self.files)

    def identity(self) -> str:
        digest = hashlib.sha256(json.dumps(["files", self.field, self.named]).encode())
        for name, path in self.files:
            stat = path.stat()
            digest.update(json.dumps([name, str(path.resolve()), stat.st_size, stat.st_mtime_ns]).encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        for name, path in self.files:
            read = RECORDS.get(path.suffix)
            if read is None:
                yield Document(name, read_pieces(path), required=self.named)
            else:
                for number, text in read(path, self.field or FIELD):
                    yield Document(f"{name}:{number}", cut_pieces(text))


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """The training split of a Hugging Face dataset, by hub name or local path."""

    spec: str
    name: str
    config: str | None
    field: str

    @property
    def total_bytes(self) -> int | None:
        return None

    def identity(self) -> str:
        # A hub name is taken to mean the same rows for ever; a local folder is known by its files.
        local = [] if not Path(self.name).exists() else _folder_files(Path(self.name))
        stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in local]
        return hashlib.sha256(json.dumps(["hf", self.name, self.config, self.field, stats]).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        for number, text in dataset_texts(self.name, self.config, self.field):
            yield Document(f"{self.name}:{number}", cut_pieces(text))


def open_source(spec: str | Path) -> Source:
    """The source that `spec` names; see the table above. Raises NotFound or DataError, in one line, if it is none.

    A path that exists wins over a glob, and both over the reading `path:field`; a file named stdlib is `./stdlib`.
    """
    text = os.fspath(spec)
    if text == "stdlib":
        return _stdlib()
    if text.startswith("hf:"):
        return _dataset(text)
    found = _files(text)
    if found is not None:
        return _file_source(text, *found, field=None)
    path, colon, field = text.rpartition(":")
    if colon and path and field:
        found = _files(path)
        if found is not None:
            return _file_source(text, *found, field=field)
        if Path(path).suffix in RECORDS:
            text = path
    raise _unknown(text)


def texts(source: Source) -> Iterator[str]:
    """The text of every document in pieces, for training a tokenizer; what is not text is passed over."""
    for document in source.documents():
        try:
            yield from document.pieces
        except NotText:
            if document.required:
                raise


def _files(path: str) -> tuple[tuple[tuple[str, Path], ...], bool] | None:
    """(files with their ids, whether `path` is one file), or None where nothing is there."""
    whole = Path(path).expanduser()
    if whole.is_dir():
        return tuple(_folder_files(whole)), False
    if whole.exists():
        if not whole.is_file():
            raise DataError(f"{path}: neither a file nor a folder; expected {EXPECTED}")
        return ((whole.name, whole),), True
    if not glob.has_magic(path):
        return None
    matches = sorted(Path(match) for match in glob.glob(str(whole), recursive=True))
    files = [match for match in matches if match.is_file()]
    if not files:
        return None
    parts = whole.parts
    root = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    return tuple((file.relative_to(root).as_posix(), file) for file in files), False


def _file_source(spec: str, files: tuple[tuple[str, Path], ...], one: bool, field: str | None) -> FileSource:
    if field is not None and not any(path.suffix in RECORDS for _, path in files):
        raise DataError(f"{spec}: ':{field}' names a field, and only .jsonl, .ndjson and .parquet files have fields")
    for _, path in files:
        if path.suffix == ".parquet":
            extra("pyarrow.parquet", str(path))
    return FileSource(spec, files, field, named=one)


def _folder_files(root: Path, left_out: frozenset[str] = frozenset()) -> list[tuple[str, Path]]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found)


def _stdlib() -> FileSource:
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(file for file in _folder_files(root, STDLIB_LEFT_OUT) if file[1].suffix == ".py")
    if not files:
        raise NotFound(f"stdlib: no .py files in {root}; this Python has no source, name a text file or folder instead")
    return FileSource("stdlib", files)


def _dataset(spec: str) -> DatasetSource:
    name, _, field = spec.removeprefix("hf:").partition(":")
    name, _, config = name.partition("@")
    if not name:
        raise DataError(f"{spec!r}: no dataset named; expected hf:NAME_OR_PATH[@CONFIG][:FIELD]")
    extra("datasets", spec)
    return DatasetSource(spec, name, config or None, field or FIELD)


def _unknown(spec: str) -> NotFound:
    if glob.has_magic(spec):
        return NotFound(f"source {spec!r}: no file matches; expected {EXPECTED}")
    path = Path(spec).expanduser()
    beside = [str(Path(spec).parent / name) for name in os.listdir(path.parent)] if path.parent.is_dir() else []
    hint = nearest(spec, ["stdlib", *beside])
    return NotFound(f"source {spec!r}: no such file or folder; expected {EXPECTED}{hint}")
