"""Weights on disk: one safetensors file, or several with an index as transformers writes them, read tensor by tensor."""

import json
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from plait.files import write_atomic, write_text

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # as transformers
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def write_weights(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], shard_bytes: int) -> None:
    """One file, or as many as keep each below `shard_bytes` (a larger tensor has a file of its own) and their index. Each is
    asked for when it is written, and once before for its size.

    The file that a reader looks at first is written last, and what an earlier save left beside it is removed after that.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    groups = _groups(sizes, shard_bytes)
    names = [WEIGHTS] if len(groups) == 1 else [_shard(i, len(groups)) for i in range(len(groups))]
    before = {path.name for path in folder.glob("model*.safetensors")} | {INDEX}
    for file, group in zip(names, groups, strict=True):
        contents = {name: tensors[name].contiguous() for name in group}
        write_atomic(folder / file, lambda path, c=contents: safetensors.torch.save_file(c, path, metadata))
    if len(groups) > 1:
        where = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
        names.append(INDEX)
    for stale in before - set(names):
        (folder / stale).unlink(missing_ok=True)


def _groups(sizes: dict[str, int], limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups


def _shard(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def weight_files(folder: Path) -> "WeightFiles":
    """The weights of a folder. Raises FileNotFoundError or ValueError naming the file that is missing or damaged."""
    if (folder / WEIGHTS).is_file():
        return WeightFiles(dict.fromkeys(_names(folder / WEIGHTS), folder / WEIGHTS), folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder / WEIGHTS}: missing; the folder holds a config without weights")
    where = _read_index(folder / INDEX)
    holds: dict[str, Path] = {}
    for path in sorted({folder / file for file in where.values()}):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; {INDEX} says that it holds {_first(where, path.name)!r}")
        for name in _names(path):
            if name in holds:
                raise ValueError(f"{path}: {name} is also in {holds[name].name}; each tensor belongs in one file")
            holds[name] = path
    for name, file in where.items():
        if holds.get(name) != folder / file:
            raise ValueError(f"{folder / INDEX}: says that {name} is in {file}, where it is not")
    return WeightFiles(holds, folder / INDEX)


def _first(where: dict[str, str], file: str) -> str:
    return next(name for name, holder in where.items() if holder == file)


def _read_index(path: Path) -> dict[str, str]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ValueError(f"{path}: {key} is listed twice")
            seen[key] = value
        return seen

    try:
        where = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: not an index of weights; expected JSON with a weight_map") from None
    if not isinstance(where, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in where.values()
    ):
        raise ValueError(f"{path}: weight_map must give each tensor a file beside the index")
    return where


def _names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


class _opened:  # noqa: N801 (a function with an exit)
    """safe_open, with damage told in one line."""

    def __init__(self, path: Path):
        try:
            self.file = safetensors.safe_open(path, framework="pt")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: corrupt or cut short ({error}), {path.stat().st_size:,} bytes") from None

    def __enter__(self) -> Any:
        return self.file.__enter__()

    def __exit__(self, *error: object) -> None:
        self.file.__exit__(*error)


class WeightSource(Protocol):
    """Tensors by name, in whatever file; iterating reads them one by one."""

    @property
    def where(self) -> Mapping[str, Path]: ...
    def expect(self, expected: set[str]) -> None: ...
    def path_of(self, name: str) -> Path: ...
    def tensor(self, name: str) -> Tensor: ...
    def sizes(self) -> dict[str, int]: ...
    def dtypes(self) -> dict[str, torch.dtype]: ...
    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


def expect(named: Path, found: Set[str], expected: Set[str]) -> None:
    """Raise ValueError for missing and unused tensors."""
    missing, unused = sorted(expected - found), sorted(found - expected)
    if missing or unused:
        raise ValueError(f"{named}: missing tensors {missing[:3]}, unused tensors {unused[:3]} (first three of each)")


@dataclass(frozen=True)
class WeightFiles:
    """Which file holds each tensor; iterating reads them one by one. `named`: the file that errors about all speak of."""

    where: dict[str, Path]
    named: Path

    def check(self, expected: Iterable[str], design: str) -> None:
        """Raise ValueError for weights of another design, and for missing and unused tensors."""
        for path in sorted(set(self.where.values())):
            with _opened(path) as file:
                written_for = (file.metadata() or {}).get("design", design)
            if written_for != design:
                raise ValueError(
                    f"{path}: weights of design {written_for}, but the config beside it describes {design}"
                )
        self.expect(set(expected))

    def expect(self, expected: set[str]) -> None:
        """Raise ValueError for missing and unused tensors."""
        expect(self.named, self.where.keys(), expected)

    def path_of(self, name: str) -> Path:
        return self.where[name]

    def tensor(self, name: str) -> Tensor:
        with _opened(self.where[name]) as file:
            return file.get_tensor(name)

    def sizes(self) -> dict[str, int]:
        """How many numbers each tensor holds, without reading any."""
        found: dict[str, int] = {}
        for path in sorted(set(self.where.values())):
            with _opened(path) as file:
                found |= {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return found

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of every tensor, without reading any. Raises ValueError for one that holds no floating point numbers that torch
        computes in."""
        found: dict[str, torch.dtype] = {}
        for path in sorted(set(self.where.values())):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    dtype = file.get_slice(name).get_dtype()
                    if dtype not in FLOATS:
                        raise ValueError(f"{path}: {name} is {dtype}; expected one of {', '.join(FLOATS)}")
                    found[name] = FLOATS[dtype]
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for path in sorted(set(self.where.values())):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    yield name, file.get_tensor(name)
