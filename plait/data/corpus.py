"""Where text comes from: a source is a spec that iterates documents lazily, each with a stable id.

| spec | documents |
|---|---|
| `stdlib` | the Python standard library's own source on this machine |
| `book.txt` | one file, one document |
| `folder` | every text file below it, through links; hidden, binary and empty ones are passed over, the latter two counted |
| `data/**/*.md` | every file that matches |
| `x.jsonl:field` | one record a document (`:field` may be left out: `text`); also for a folder or a glob |
| `x.parquet:field` | the same; needs the `datasets` extra |
| `hf:NAME_OR_PATH[@CONFIG][:field]` | the training split of a Hugging Face dataset; needs the `datasets` extra |

A path may begin with `~`. Files are UTF-8; a byte order mark at their head is no part of the text. A folder that is a link
to one that it lies in is not entered. A document is known by its place below the source and a source by its content, so
that neither changes when files are moved together, copied or touched.

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
from plait.data.known import content_hashes
from plait.data.records import READERS, dataset_texts, extra
from plait.data.text import cut_pieces, read_pieces
from plait.data.walk import files_below, files_matching
from plait.files import letters, user_path

EXPECTED = "stdlib, a text file, a folder, a glob, x.jsonl:field, x.parquet:field or hf:NAME"
FIELD = "text"
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
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
        """A hash of the documents' ids and texts: another one where any may differ."""
        ...

    def documents(self) -> Iterator[Document]: ...


@dataclass(frozen=True, slots=True)
class FileSource:
    """Files by (id, path), in order. `named`: the spec is this one file. `memory`: see `content_hashes`."""

    spec: str
    files: tuple[tuple[str, Path], ...]
    field: str | None = None
    named: bool = False
    memory: Path | None = None

    @property
    def total_bytes(self) -> int | None:
        if any(_kind(path) == ".parquet" for _, path in self.files):
            return None  # compressed, so its size says nothing of the text's
        return sum(path.stat().st_size for _, path in self.files)

    def identity(self) -> str:
        kinds = [_kind(path) for _, path in self.files]
        names = [None] if self.named else [name for name, _ in self.files]  # how one file is called changes nothing
        hashes = content_hashes((path for _, path in self.files), self.memory)
        field = (self.field or FIELD) if any(kinds) else None
        return _digest(["files", field, list(zip(names, kinds, hashes, strict=True))])

    def documents(self) -> Iterator[Document]:
        for name, path in self.files:
            kind = _kind(path)
            if kind is None:
                yield Document(name, read_pieces(path), required=self.named)
                continue
            for number, text in READERS[kind](path, self.field or FIELD):
                yield Document(str(number) if self.named else f"{name}:{number}", cut_pieces(text))


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """The training split of a Hugging Face dataset, by hub name or local path."""

    spec: str
    name: str
    config: str | None
    field: str
    memory: Path | None = None

    @property
    def total_bytes(self) -> int | None:
        return None

    def identity(self) -> str:
        if not self._local:  # a hub name is taken to mean the same rows for ever
            return _digest(["hf", self.name, self.config, self.field])
        files = files_below(Path(self.name))
        hashes = content_hashes((path for _, path in files), self.memory)
        names = [name for name, _ in files]
        return _digest(["hf", self.config, self.field, list(zip(names, hashes, strict=True))])

    def documents(self) -> Iterator[Document]:
        before = "" if self._local else f"{self.name}:"
        for number, text in dataset_texts(self.name, self.config, self.field):
            yield Document(f"{before}{number}", cut_pieces(text))

    @property
    def _local(self) -> bool:
        return Path(self.name).exists()


def open_source(spec: str | Path, memory: Path | None = None) -> Source:
    """The source that `spec` names; see the table above. Raises NotFound or DataError, in one line, if it is none.

    A path that exists wins over a glob, and both over the reading `path:field`; a file named stdlib is `./stdlib`.
    `memory`: a folder that remembers what files held, so that the unchanged ones are not read again for `identity`.
    """
    if not isinstance(spec, str | Path):
        raise DataError(f"source of type {type(spec).__name__}; expected {EXPECTED}")
    text = os.fspath(spec)
    if not text or "\0" in text:
        raise DataError(f"source {text!r}; expected {EXPECTED}")
    if memory is not None:
        memory = memory / ".known" / f"{_digest([text, os.getcwd()])[:16]}.json"
    if text == "stdlib":
        return _stdlib(memory)
    if text.startswith("hf:"):
        return _dataset(text, memory)
    files = _files(text)
    if files is not None:
        return _file_source(text, *files, field=None, memory=memory)
    path, colon, field = text.rpartition(":")
    if colon and path and field:
        files = _files(path)
        if files is not None:
            return _file_source(text, *files, field=field, memory=memory)
        if Path(path).suffix.lower() in READERS:
            text = path
    raise _unknown(text)


def texts(source: Source) -> Iterator[str]:
    """The text of every document in pieces; what is not text is passed over."""
    for document in source.documents():
        try:
            yield from document.pieces
        except NotText:
            if document.required:
                raise


def _files(path: str) -> tuple[tuple[tuple[str, Path], ...], bool] | None:
    """(files with their ids, whether `path` is one file), or None where nothing is there."""
    place = user_path(path)
    if place.is_dir():
        return tuple(files_below(place)), False
    if place.exists():
        if not place.is_file():
            raise DataError(f"{path}: neither a file nor a folder; expected {EXPECTED}")
        return ((letters(place.name), place),), True
    files = files_matching(place) if glob.has_magic(path) else []
    return (tuple(files), False) if files else None


def _file_source(
    spec: str, files: tuple[tuple[str, Path], ...], one: bool, field: str | None, memory: Path | None
) -> FileSource:
    if field is not None and not any(_kind(path) for _, path in files):
        if one and files[0][1].suffix.lower() in PACKED:
            raise DataError(f"{spec}: a compressed file; unpack it first")
        raise DataError(f"{spec}: ':{field}' names a field, and only .jsonl, .ndjson and .parquet files have fields")
    for _, path in files:
        if _kind(path) == ".parquet":
            extra("pyarrow.parquet", str(path))
    return FileSource(spec, files, field, named=one, memory=memory)


def _kind(path: Path) -> str | None:
    """The suffix of a file of records, or None: text."""
    suffix = path.suffix.lower()
    return suffix if suffix in READERS else None


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _stdlib(memory: Path | None) -> FileSource:
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(file for file in files_below(root, STDLIB_LEFT_OUT) if file[1].suffix == ".py")
    if not files:
        raise NotFound(f"stdlib: no .py files in {root}; this Python has no source, name a text file or folder instead")
    return FileSource("stdlib", files, memory=memory)


def _dataset(spec: str, memory: Path | None) -> DatasetSource:
    name, config, field = _dataset_parts(spec.removeprefix("hf:"))
    if not name:
        raise DataError(f"{spec!r}: no dataset named; expected hf:NAME_OR_PATH[@CONFIG][:FIELD]")
    extra("datasets", spec)
    if name.startswith("~") or user_path(name).exists():
        name = str(user_path(name))
    return DatasetSource(spec, name, config or None, field or FIELD, memory)


def _dataset_parts(text: str) -> tuple[str, str, str]:
    """(name, config, field); a path that exists is a name, whatever signs are in it."""
    path, _, field = text.rpartition(":")
    for name, after in ((text, ""), (path, field)):
        if name and user_path(name).exists():
            return name, "", after
    name, _, field = text.partition(":")
    name, _, config = name.partition("@")
    return name, config, field


def _unknown(spec: str) -> NotFound:
    if glob.has_magic(spec):
        return NotFound(f"source {spec!r}: no file matches; expected {EXPECTED}")
    parent = user_path(spec).parent
    beside = [str(Path(spec).parent / name) for name in os.listdir(parent)] if parent.is_dir() else []
    hint = nearest(spec, ["stdlib", *beside])
    return NotFound(f"source {spec!r}: no such file or folder; expected {EXPECTED}{hint}")
