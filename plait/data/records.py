"""Documents that are one field of a record: JSON lines, parquet files and Hugging Face datasets."""

import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from plait.data.errors import DataError, NotFound, NotText, nearest


def jsonl_texts(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of every record; blank lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise NotText(f"{where}: not UTF-8; expected one JSON object a line") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error.msg}); expected one JSON object a line") from None
            if not isinstance(record, dict):
                raise DataError(f"{where}: {type(record).__name__} found; expected a JSON object with field {field!r}")
            yield number, _field(record, field, where)


def parquet_texts(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """(row number from 1, text) of every row, a few hundred rows in memory at once."""
    parquet = extra("pyarrow.parquet", str(path))
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's errors for files it cannot read are all of these
        raise DataError(f"{path}: not a parquet file ({_first_line(error)})") from None
    with file:
        names = file.schema_arrow.names
        if field not in names:
            raise _no_field(field, names, str(path))
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield number, _field({field: value}, field, f"{path}, row {number}")


def dataset_texts(name: str, config: str | None, field: str) -> Iterator[tuple[int, str]]:
    """(row number from 1, text) of the training split of a Hugging Face dataset, streamed."""
    datasets = extra("datasets", f"hf:{name}")
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(name)
            rows: Any = loaded["train"] if isinstance(loaded, Mapping) else loaded
        else:
            rows = datasets.load_dataset(name, config, split="train", streaming=True)
    except FileNotFoundError as error:
        raise NotFound(f"hf:{name}: {_first_line(error)}") from None
    except (ValueError, KeyError, OSError) as error:
        raise DataError(f"hf:{name}: {_first_line(error)}; expected hf:NAME_OR_PATH[@CONFIG][:FIELD]") from None
    for number, row in enumerate(rows, start=1):
        yield number, _field(row, field, f"hf:{name}, row {number}")


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
    if text.isascii():
        return text
    # JSON can spell half of a surrogate pair, which UTF-8 cannot; it becomes U+FFFD.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _no_field(field: str, present: Mapping[str, Any] | list[str], where: str) -> DataError:
    names = list(present)
    shown = ", ".join(repr(name) for name in names[:12]) or "none"
    return DataError(f"{where}: no field {field!r}, its fields are {shown}{nearest(field, names)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
