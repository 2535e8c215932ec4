"""Documents that are one field of a record: JSON lines, parquet files and Hugging Face datasets."""

import codecs
import json
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from plait.data.errors import DataError, NotFound, NotText, first_line, nearest
from plait.data.text import PACKED, whole_characters
from plait.files import OTHER_UNICODE

BLOCK = 1 << 12  # bytes that show what kind of file it is
# Numbers are never a text, and Python refuses to convert those of thousands of digits.
_JSON = json.JSONDecoder(parse_int=lambda digits: 0)


def jsonl_texts(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of every record; blank lines and byte order marks are passed over."""
    for number, record in jsonl_records(path, f"field {field!r}", _JSON):
        yield number, _field(record, field, f"{path}, line {number}")


def jsonl_records(
    path: Path,
    holds: str,
    decoder: json.JSONDecoder = json.JSONDecoder(),  # noqa: B008 (it keeps nothing)
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank; `holds`: what errors say that an object should have."""
    with path.open("rb") as file:
        _refuse_other_files(file.peek(BLOCK), path)
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8)
            if line and not line.isspace():
                yield number, _record(line, holds, f"{path}, line {number}", decoder)


def _record(line: bytes, holds: str, where: str, decoder: json.JSONDecoder) -> dict[str, Any]:
    try:
        record = decoder.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise NotText(f"{where}: not UTF-8; expected one JSON object a line") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); expected one JSON object a line") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply to be read; expected a JSON object with {holds}") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where}: JSON that cannot be read ({first_line(error)})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: {type(record).__name__} found; expected a JSON object with {holds}")
    return record


def _refuse_other_files(head: bytes, path: Path) -> None:
    packed = PACKED.match(head)
    if packed:
        raise NotText(f"{path}: compressed ({packed.lastgroup}); expected one JSON object a line, unpack it first")
    if head[:2] in OTHER_UNICODE:
        raise NotText(f"{path}, line 1: {OTHER_UNICODE[head[:2]]}; expected one JSON object a line, save it as UTF-8")


def parquet_texts(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """(row number from 1, text) of every row, a few hundred rows in memory at once."""
    parquet = extra("pyarrow.parquet", str(path))
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's errors for files it cannot read are all of these
        raise DataError(f"{path}: not a parquet file ({first_line(error)})") from None
    with file:
        names = file.schema_arrow.names
        if field not in names:
            raise _no_field(field, names, str(path))
        values = (
            value
            for batch in file.iter_batches(batch_size=256, columns=[field])
            for value in batch.column(batch.schema.names.index(field)).to_pylist()
        )
        for number, value in _counted(values, lambda number: f"{path}, row {number}"):
            yield number, _field({field: value}, field, f"{path}, row {number}")


def dataset_texts(name: str, config: str | None, field: str) -> Iterator[tuple[int, str]]:
    """(row number from 1, text) of the training split of a Hugging Face dataset, streamed."""
    rows = _counted(_dataset_rows(name, config), lambda number: f"hf:{name}, row {number}")
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except DataError as error:
            raise _first_damage(Path(name), field) or error from None
        yield number, _field(row, field, f"hf:{name}, row {number}")


def _dataset_rows(name: str, config: str | None) -> Iterator[Mapping[str, Any]]:
    datasets = extra("datasets", f"hf:{name}")
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(name)
            rows: Any = loaded["train"] if isinstance(loaded, Mapping) else loaded
        else:
            rows = datasets.load_dataset(name, config, split="train", streaming=True)
    except FileNotFoundError as error:
        raise NotFound(f"hf:{name}: {first_line(error)}") from None
    except Exception as error:  # each of the library's formats fails in its own way
        raise DataError(f"hf:{name}: {first_line(error)}; expected hf:NAME_OR_PATH[@CONFIG][:FIELD]") from None
    yield from rows


def _counted(values: Iterator[Any], where: Callable[[int], str]) -> Iterator[tuple[int, Any]]:
    """Values numbered from 1, and what fails between them, as each library does in its own way, with its number."""
    number = 0
    try:
        for number, value in enumerate(values, start=1):
            yield number, value
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where(number + 1)} or soon after: cannot be read ({first_line(error)})") from None


def _first_damage(folder: Path, field: str) -> DataError | None:
    """The file and line of a local dataset that its library tripped over, if our own readers find it."""
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        read = READERS.get(path.suffix.lower())
        try:
            for _ in read(path, field) if read and path.is_file() else ():
                pass
        except _NoField:
            continue  # a file beside the data
        except DataError as error:
            return error
    return None


def extra(module: str, what: str) -> Any:
    """A module that comes with the `datasets` extra; raises DataError where it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        raise DataError(f"{what}: needs {module}, which is not installed; pip install 'plait[datasets]'") from None


def _field(record: Mapping[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise _no_field(field, record, where)
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is {type(text).__name__}; expected a string")
    return whole_characters(text)


class _NoField(DataError):
    pass


def _no_field(field: str, present: Mapping[str, Any] | list[str], where: str) -> DataError:
    names = list(present)
    shown = ", ".join(repr(name) for name in names[:12]) or "none"
    return _NoField(f"{where}: no field {field!r}, its fields are {shown}{nearest(field, names)}")


READERS = {".jsonl": jsonl_texts, ".ndjson": jsonl_texts, ".parquet": parquet_texts}
