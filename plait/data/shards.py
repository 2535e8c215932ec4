"""A corpus as token ids on disk, mapped into memory: written once, whole or not at all, found again by its content.

One folder per (source, tokenizer, held-out share, seed), named by the hash of these:

| file | holds |
|---|---|
| `tokens.bin` | every document's ids, each followed by the end-of-text id; uint16, or uint32 for a large vocabulary |
| `offsets.bin` | int64 (documents + 1): where each document starts in `tokens.bin` |
| `split.bin` | uint8 (documents): 0 train, 1 held out |
| `token_bytes.bin` | int32 (vocab): bytes of text per id |
| `scored.bin` | of records with answers, uint8 (tokens): 1 for what is learned; their documents have no end-of-text id added |
| `meta.json` | the rest; no clock and no machine in it, so equal inputs give equal bytes |
| `known.json` | when the files above were last found to be what was written; only ever a saving |
"""

import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from plait.data.errors import DataError, NotFound, nearest
from plait.data.known import content_hashes
from plait.files import user_path

FORMAT = 1
KNOWN = "known.json"
SPLITS = ("train", "heldout")
Split = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True)
class Meta:
    """What meta.json says. `passed_over` counts files that were not UTF-8 text and documents that were empty; `answers`:
    documents are records with answers, of which alone is learned, and `cut` of them lost a part to the length; `digests`: of
    the other files' contents, none where an earlier version wrote them."""

    format: int
    key: str
    source: str
    tokenizer: str
    vocab: int
    eos: int
    dtype: str
    tokens: int
    documents: int
    heldout_documents: int
    bytes: int
    heldout: float
    seed: int
    tail_held_out: bool
    passed_over: dict[str, int]
    answers: bool = False
    cut: int = 0
    digests: dict[str, str] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        """Bytes of the other files."""
        entries = self.documents + self.tail_held_out
        return {
            "tokens.bin": self.tokens * np.dtype(self.dtype).itemsize,
            "offsets.bin": (entries + 1) * 8,
            "split.bin": entries,
            "token_bytes.bin": self.vocab * 4,
            **({"scored.bin": self.tokens} if self.answers else {}),
        }


class Shards:
    """Token shards on disk, opened. Their files are read through once, and again where they have been written or copied
    since; beyond that, of the tokens nothing is read before it is asked for."""

    def __init__(self, folder: str | Path):
        self.folder = user_path(folder)
        self.meta = _read_meta(self.folder)
        for name, expected in self.meta.sizes().items():
            path = self.folder / name
            size = path.stat().st_size if path.exists() else 0
            if size != expected:
                raise DataError(f"{path}: {size} bytes where {expected} were written; prepare the corpus again")
        self._check_contents()

    def _check_contents(self) -> None:
        """Raise DataError where a file does not hold what was written."""
        paths = [self.folder / name for name in self.meta.digests]
        for path, found in zip(paths, content_hashes(paths, self.folder / KNOWN), strict=True):
            if found != self.meta.digests[path.name]:
                raise DataError(f"{path}: damaged; prepare the corpus again")

    def _offsets(self) -> NDArray[np.int64]:
        return np.fromfile(self.folder / "offsets.bin", dtype=np.int64)

    def _sides(self) -> NDArray[np.uint8]:
        return np.fromfile(self.folder / "split.bin", dtype=np.uint8)

    @property
    def key(self) -> str:
        return self.meta.key

    @property
    def vocab(self) -> int:
        return self.meta.vocab

    @property
    def eos(self) -> int:
        return self.meta.eos

    def tokens(self, scattered: bool = False) -> NDArray[Any]:
        """All ids, mapped and read-only: only what is indexed is read. `scattered`: without reading ahead of it."""
        return self._mapped("tokens.bin", self.meta.dtype, scattered)

    def scored(self, scattered: bool = False) -> NDArray[np.uint8] | None:
        """1 for each of `tokens()` that is learned, mapped as they are; None: all are."""
        return self._mapped("scored.bin", "uint8", scattered) if self.meta.answers else None

    def _mapped(self, name: str, dtype: str, scattered: bool) -> NDArray[Any]:
        with (self.folder / name).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if scattered and hasattr(mmap, "MADV_RANDOM"):
            # Linux reads megabytes around each page of a map: shuffled pieces would read the corpus many times over.
            mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, dtype=dtype)

    def documents(self, split: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(starts, ends) in `tokens()` of the split's documents, in corpus order; an end is past the end-of-text id."""
        if split not in SPLITS:
            raise DataError(f"split {split!r}: expected train or heldout{nearest(split, SPLITS)}")
        chosen, offsets = self._sides() == SPLITS.index(split), self._offsets()
        return offsets[:-1][chosen], offsets[1:][chosen]

    def token_bytes(self) -> NDArray[np.int32]:
        """(vocab,) bytes of text per id."""
        return np.fromfile(self.folder / "token_bytes.bin", dtype=np.int32)


def _read_meta(folder: Path) -> Meta:
    path = folder / "meta.json"
    if not path.is_file():
        raise NotFound(f"{folder}: no token shards here; expected a folder that plait.data.prepare wrote")
    try:
        meta = msgspec.json.decode(path.read_bytes(), type=Meta)
        np.dtype(meta.dtype)
    except (ValueError, TypeError):
        raise DataError(f"{path}: damaged, or written by another version of plait; prepare the corpus again") from None
    if meta.format != FORMAT:
        raise DataError(f"{path}: format {meta.format}, expected {FORMAT}; prepare the corpus again")
    return meta
