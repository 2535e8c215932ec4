"""Tokenize a corpus once, in a stream, into shards that the next run finds again."""

import hashlib
import json
import os
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from plait.data.cache import cached
from plait.data.corpus import Source, open_source
from plait.data.errors import DataError, NotFound, NotText, whole_number
from plait.data.known import content_hashes
from plait.data.shards import FORMAT, Meta, Shards
from plait.data.text import whole_characters
from plait.data.tokenizer import Tokenizer
from plait.files import sync_folder, user_path

BATCH = 1 << 20  # characters tokenized at once; Hugging Face tokenizers need some 200 bytes for each
LINE_SEARCH = 4096  # tokens searched for the end of a line when one document must be cut in two

Progress = Callable[[int, int | None], None]


def prepare(
    source: str | Path | Source,
    tokenizer: Tokenizer,
    folder: str | Path,
    heldout: float = 0.02,
    seed: int = 0,
    progress: Progress | None = None,
) -> Shards:
    """The shards of `source` under `folder`, made now unless they are there already.

    A document is held out if the hash of its id and `seed` falls below `heldout`, whatever else is in the corpus; if
    that leaves a side empty, the document nearest to the line crosses it. A corpus of one document is cut instead: its
    last `heldout` share of tokens, from the next line end on where one is near, is held out.
    The shards are found again by what the source holds, wherever it lies.
    `progress(done, total)` counts bytes of text; `total` is None where it is unknown.
    Raises DataError for a corpus without text, OSError where the disk is full; either way nothing is left behind.
    """
    heldout, seed = checked(heldout, seed)
    cache = user_path(folder)
    opened = source if not isinstance(source, str | Path) else open_source(source, cache)
    identity = opened.identity()

    def make(temporary: Path) -> None:
        _write(temporary, key, opened, tokenizer, heldout, seed, progress)
        check_unchanged(opened, identity)

    key = shard_key(identity, tokenizer, heldout, seed)
    return cached(cache, key, open_whole, make)


def checked(heldout: float, seed: int) -> tuple[float, int]:
    if not isinstance(heldout, Real) or not 0 < heldout < 1:
        raise DataError(f"heldout={heldout}: expected a share between 0 and 1, for example 0.02")
    return float(heldout), whole_number("seed", seed, 0)


def check_unchanged(source: Source, identity: str) -> None:
    if source.identity() != identity:
        raise DataError(f"{source.spec}: changed while it was being read; run again")


def shard_key(identity: str, tokenizer: Tokenizer, heldout: float, seed: int, *more: object) -> str:
    parts = [FORMAT, identity, tokenizer.hash, tokenizer.eos, heldout, seed, *more]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def open_whole(folder: Path) -> Shards | None:
    try:
        return Shards(folder)
    except (DataError, NotFound):
        return None


def _write(
    folder: Path, key: str, source: Source, tokenizer: Tokenizer, heldout: float, seed: int, progress: Progress | None
) -> None:
    dtype = id_dtype(tokenizer)
    total = source.total_bytes
    split = Splitter(heldout, seed)
    with (folder / "tokens.bin").open("w+b", buffering=1 << 20) as file:
        report = (lambda done: None) if progress is None else (lambda done: progress(done, total))
        writer = _Writer(file, tokenizer, dtype, split, report)
        _read(source, writer)
        offsets, count = writer.offsets, len(split.sides)
        if not count:
            passed = ", ".join(f"{n} {what}" for what, n in writer.passed_over.items() if n) or "no documents"
            raise DataError(f"{source.spec}: no text in it ({passed}); expected at least one document of UTF-8 text")
        if count == 1:
            offsets.insert(1, _tail(file, offsets[1], tokenizer, dtype, heldout, source.spec))
            split.sides = bytearray((0, 1))
        else:
            split.fill_both_sides()
        sync(file)
    meta = Meta(
        format=FORMAT, key=key, source=source.spec, tokenizer=tokenizer.name, vocab=tokenizer.vocab, eos=tokenizer.eos,
        dtype=dtype, tokens=offsets[-1], documents=count, heldout_documents=sum(split.sides), bytes=writer.bytes,
        heldout=heldout, seed=seed, tail_held_out=count == 1, passed_over=writer.passed_over,
    )  # fmt: skip
    finish(folder, meta, offsets, split, tokenizer)


def id_dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab <= 1 << 16 else "uint32"


def finish(folder: Path, meta: Meta, offsets: "array[int]", split: "Splitter", tokenizer: Tokenizer) -> None:
    """All but the tokens; what says that the folder is whole comes last."""
    _write_bytes(folder / "offsets.bin", offsets.tobytes())
    _write_bytes(folder / "split.bin", bytes(split.sides))
    _write_bytes(folder / "token_bytes.bin", tokenizer.byte_lengths.astype(np.int32).tobytes())
    digests = content_hashes(folder / name for name in meta.sizes())
    meta = replace(meta, digests=dict(zip(meta.sizes(), digests, strict=True)))
    _write_bytes(folder / "meta.json", (json.dumps(asdict(meta), indent=2) + "\n").encode())
    sync_folder(folder)


def _read(source: Source, writer: "_Writer") -> None:
    for document in source.documents():
        try:
            for piece in document.pieces:
                writer.add(whole_characters(piece))
        except NotText:
            if document.required:
                raise
            writer.forget("binary")
            continue
        if not writer.end(document.id) and document.required:
            raise DataError(f"{source.spec}: an empty file; expected UTF-8 text")
    writer.flush()


@dataclass(slots=True)
class Splitter:
    """Which side each document is on (one byte a document), and which would cross the line first."""

    heldout: float
    seed: int
    sides: bytearray = field(default_factory=bytearray)
    _lowest: tuple[float, int] = (2.0, -1)
    _highest: tuple[float, int] = (-1.0, -1)

    def add(self, id: str) -> None:
        digest = hashlib.blake2b(f"{self.seed}:{id}".encode(errors="surrogatepass"), digest_size=8).digest()
        place = (int.from_bytes(digest, "big") >> 11) / (1 << 53)
        self._lowest = min(self._lowest, (place, len(self.sides)))
        self._highest = max(self._highest, (place, len(self.sides)))
        self.sides.append(place < self.heldout)

    def fill_both_sides(self) -> None:
        if not any(self.sides):
            self.sides[self._lowest[1]] = 1
        elif all(self.sides):
            self.sides[self._highest[1]] = 0


class _End(NamedTuple):
    """Where a document ends among pending pieces."""

    id: str


class _Writer:
    """Documents' pieces into ids on disk, a few MiB of text at a time; one that has not ended can be taken back."""

    def __init__(
        self, file: BinaryIO, tokenizer: Tokenizer, dtype: str, split: Splitter, progress: Callable[[int], None]
    ):
        self._file, self._tokenizer, self._dtype = file, tokenizer, np.dtype(dtype)
        self._split, self._progress = split, progress
        self._pending: list[str | _End] = []
        self._characters = 0  # pending
        self._written = 0  # ids in the file
        self._blank = True  # the document under way has shown nothing but white space
        self._whole_bytes = 0  # of the documents that have ended
        self.bytes = 0
        self.offsets = array("q", [0])
        self.passed_over = {"binary": 0, "empty": 0}

    def add(self, piece: str) -> None:
        self._pending.append(piece)
        self._characters += len(piece)
        self._blank = self._blank and piece.isspace()
        if self._characters >= BATCH:
            self.flush()

    def end(self, id: str) -> bool:
        """Whether the document that ends here has text; one of white space is passed over."""
        if self._blank:
            self.forget("empty")
            return False
        self._pending.append(_End(id))
        self._blank = True
        return True

    def forget(self, why: str) -> None:
        """Take back the document under way."""
        self.passed_over[why] += 1
        self._blank = True
        while self._pending and isinstance(piece := self._pending[-1], str):
            self._characters -= len(piece)
            self._pending.pop()
        if not self._pending:  # so every id after the last end in the file is this document's
            self._written, self.bytes = self.offsets[-1], self._whole_bytes
            self._file.seek(self._written * self._dtype.itemsize)
            self._file.truncate()

    def flush(self) -> None:
        encoded = iter(self._tokenizer.encode_batch([piece for piece in self._pending if isinstance(piece, str)]))
        for piece in self._pending:
            if isinstance(piece, str):
                self._write(next(encoded))
                self.bytes += len(piece.encode())
            elif self._written == self.offsets[-1]:
                self.passed_over["empty"] += 1  # text, but none that this tokenizer has ids for
            else:
                self._write(np.array([self._tokenizer.eos]))
                self.offsets.append(self._written)
                self._split.add(piece.id)
                self._whole_bytes = self.bytes
        self._pending.clear()
        self._characters = 0
        self._progress(self.bytes)

    def _write(self, ids: NDArray[np.integer]) -> None:
        self._file.write(ids.astype(self._dtype).tobytes())
        self._written += len(ids)


def _tail(file: BinaryIO, total: int, tokenizer: Tokenizer, dtype: str, heldout: float, spec: str) -> int:
    """Where to cut the only document, of `total` ids: after the first line end in the first half of its tail, or before
    the tail if there is none near."""
    if total < 4:
        raise DataError(
            f"{spec}: one document of {total - 1} tokens; expected at least 3, or more documents, to hold some out"
        )
    cut = min(max(1, total - round(total * heldout)), total - 2)
    file.seek(cut * np.dtype(dtype).itemsize)
    near = min(LINE_SEARCH, (total - cut) // 2)
    for place, id in enumerate(np.frombuffer(file.read(near * np.dtype(dtype).itemsize), dtype=dtype)):
        if tokenizer.decode([int(id)]).endswith("\n"):
            return min(cut + place + 1, total - 2)
    return cut


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        sync(file)


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
