"""Where a design comes from: a preset, a pattern, a file, a folder, or plain data."""

import json
import os
import re
from pathlib import Path
from typing import Any

from plait.design.imports import KEY, asked, load_modules, located
from plait.design.model import ModelConfig
from plait.design.pattern import PatternError, parse
from plait.design.presets import PRESETS
from plait.design.spelling import suggest
from plait.design.struct import plain
from plait.design.yaml_core import read_yaml
from plait.files import read_text, user_path
from plait.run_folder import RUN, checkpoints

DEFAULT_SIZE = {"vocab": 32_000, "dim": 512}  # for a bare pattern, as in `plait show "(MF)3 AF"`
SAVED = "config.json"
UNQUOTED = re.compile(r"\bpattern: *\[[A-Z]")


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds one mapping. Modules to `import` that lie beside it are named by their paths."""
    text = read_text(path)
    try:
        data = read_json(text) if path.suffix == ".json" else read_yaml(text)
    except ValueError as error:
        form = "JSON" if path.suffix == ".json" else "YAML"
        hint = "; a pattern that begins with [ wants quotes" if UNQUOTED.search(text) else ""
        raise ValueError(f"{path}: cannot be read as {form}: {error}{hint}") from None
    if not isinstance(data, dict):
        kind = "nothing" if data is None else type(data).__name__
        raise ValueError(f"{path}: expected a mapping of keys to values, got {kind}")
    try:
        return located(data, path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_json(text: str) -> Any:
    """Plain data from JSON text. Raises ValueError with the line where there is one."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except _DuplicateKey as error:
        read_yaml(text)  # which says the line, where YAML reads this JSON at all
        raise ValueError(str(error)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("brackets nested too deeply to read") from None


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return data


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


def load_design(spec: str | Path | dict[str, Any] | ModelConfig, **overrides: Any) -> ModelConfig:
    """A design from a preset's name, a pattern, a YAML/JSON file (of a design or a run), a saved model's or a run's
    folder, or plain data.

    `overrides` replace top-level keys; dotted keys such as `layers.A.heads` reach further in. Modules that `import` names
    are loaded first, but for those that a saved model names: see `plait.design.imports`.
    """
    if KEY in overrides:
        load_modules(asked(overrides))
    if isinstance(spec, ModelConfig):
        data, ours = spec.to_dict(), False
    elif isinstance(spec, dict):
        data, ours = spec, True
    elif isinstance(spec, str | os.PathLike):
        data, ours = find_design(spec)
    else:
        raise ValueError(
            f"a design is a ModelConfig, plain data, or the name of a preset, pattern or file; got {spec!r}"
        )
    if ours:
        load_modules(asked(data))
    return ModelConfig.from_dict(override(data, {key: value for key, value in overrides.items() if key != KEY}))


def design_mapping(spec: str | Path) -> dict[str, Any]:
    """A design, however it is named, as the mapping that a run holds: no vocab where the tokenizer is to give it."""
    data, ours = find_design(spec)
    preset = PRESETS.get(str(spec))
    sized = data is preset or data == _bare(str(spec))
    return {key: value for key, value in data.items() if not (sized and key == "vocab") and (ours or key != KEY)}


def find_design(spec: str | Path) -> tuple[dict[str, Any], bool]:
    """The plain data that a preset, pattern, file or folder stands for, and whether its imports may be loaded."""
    if str(spec) in PRESETS:
        return PRESETS[str(spec)], True
    path = user_path(spec or " ")  # no text at all is an empty pattern
    if os.path.isdir(path):  # os.path: a pattern may be longer than any file's name
        path = design_file(path)
    if path.suffix in (".yaml", ".yml", ".json") or os.path.isfile(path):
        return _of_file(path)
    try:
        parse(str(spec))
    except PatternError as error:
        if not any(sign in str(spec) for sign in "()[]|") and not str(spec).strip()[:1].isupper() and str(spec).strip():
            if os.sep in str(spec):
                raise FileNotFoundError(
                    f"{spec}: no such file or folder; expected a preset, a pattern, a design's file or a model's folder"
                ) from None
            raise ValueError(f"no preset, file or pattern {str(spec)!r}; {suggest(str(spec), PRESETS)}") from None
        raise error
    return _bare(str(spec)), True


def _bare(pattern: str) -> dict[str, Any]:
    return {**DEFAULT_SIZE, "pattern": pattern}


def design_file(folder: Path) -> Path:
    """Where a folder's design is written: a saved model's config.json, that of a run's newest checkpoint, or its run.yaml.

    Raises FileNotFoundError for a folder with none of these.
    """
    for path in (folder / SAVED, *(step / SAVED for step in reversed(checkpoints(folder))), folder / RUN):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder}: a folder without {SAVED}, checkpoints/step-* or {RUN}; expected a saved model or a run"
    )


def is_foreign(folder: Path) -> bool:
    """Whether a folder's config is another library's, which `plait.hub` may read."""
    config = folder / SAVED
    return config.is_file() and read_mapping(config).get("model_type", "plait") != "plait"


def _of_file(path: Path) -> tuple[dict[str, Any], bool]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a design in YAML or JSON")
    data = read_mapping(path)
    if "design" not in data:
        return data, path.name != SAVED
    design = data["design"]
    if not isinstance(design, str | dict):
        raise ValueError(f"{path}: design: expected a pattern, a preset, a file or a mapping, got {design!r}")
    design, ours = (design, path.name != SAVED) if isinstance(design, dict) else find_design(design)
    return (design | {KEY: [*asked(data), *asked(design)]} if ours and KEY in data else design), ours


def override(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested plain data with dotted keys set."""
    result = plain(data)
    for key, value in changes.items():
        node, *inner = key.split(".")
        target = result
        for name in inner:
            target = target.setdefault(node, {})
            if not isinstance(target, dict):
                raise ValueError(f"{key}: {node!r} is {target!r}, which has no fields to set")
            node = name
        target[node] = value
    return result
