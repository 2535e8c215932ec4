"""Sources, tokenizers and shards made by hand for the data tests."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest

from plait.data import Document, Loader, Meta, Shards, Tokenizer, open_source, texts, train_bpe


@dataclass(frozen=True)
class ListSource:
    """Documents given as (id, text)."""

    items: tuple[tuple[str, str], ...]
    spec: str = "list"
    total_bytes: int | None = None

    def identity(self) -> str:
        return hashlib.sha256(json.dumps(self.items).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        for id, text in self.items:
            yield Document(id, [text] if text else [])


@pytest.fixture(scope="session")
def list_source() -> type[ListSource]:
    return ListSource


@pytest.fixture(scope="session")
def counting_shards(tmp_path_factory):
    """Shards whose token ids are their own places: (lengths of documents, their sides) -> Shards."""
    numbers = itertools.count()
    root = tmp_path_factory.mktemp("counting")

    def make(lengths: list[int], sides: list[int]) -> Shards:
        folder = root / str(next(numbers))
        folder.mkdir()
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        total = int(offsets[-1])
        np.arange(total, dtype=np.uint32).tofile(folder / "tokens.bin")
        offsets.tofile(folder / "offsets.bin")
        np.array(sides, dtype=np.uint8).tofile(folder / "split.bin")
        np.full(total, 3, dtype=np.int32).tofile(folder / "token_bytes.bin")
        meta = Meta(
            format=1, key=f"counting {lengths} {sides}", source="counting", tokenizer="counting", vocab=total, eos=0,
            dtype="uint32", tokens=total, documents=len(lengths), heldout_documents=sum(sides), bytes=0, heldout=0.5,
            seed=0, tail_held_out=False, passed_over={},
        )  # fmt: skip
        (folder / "meta.json").write_text(json.dumps(asdict(meta)))
        return Shards(folder)

    return make


@pytest.fixture(scope="session")
def documents():
    """The ids of every document of a split, ends of text included."""

    def read(shards: Shards, split: str) -> list[list[int]]:
        tokens = shards.tokens()
        return [tokens[start:end].tolist() for start, end in zip(*shards.documents(split), strict=True)]

    return read


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    """A BPE trained on a little of the standard library."""
    return train_bpe(itertools.islice(texts(open_source("stdlib")), 20), 600)


@pytest.fixture
def write(tmp_path: Path):
    """Write a file of text or bytes below tmp_path."""

    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


@pytest.fixture(scope="session")
def pieces():
    """The packed pieces of batches: (inputs, targets) lists."""

    def split(loader: Loader | list) -> Iterator[tuple[list[int], list[int]]]:
        for batch in loader:
            cuts = batch.cu_seqlens.tolist()
            for start, end in itertools.pairwise(cuts):
                yield batch.inputs[0, start:end].tolist(), batch.targets[0, start:end].tolist()

    return split
