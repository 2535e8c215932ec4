"""Where a design comes from: a preset, a pattern, a file, or plain data."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from plait.design.model import ModelConfig
from plait.design.pattern import PatternError, parse
from plait.design.presets import PRESETS
from plait.design.spelling import suggest
from plait.files import read_text


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: PyYAML takes "3e-4" for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """Plain data from YAML text."""
    return yaml.load(text, _Loader)  # a SafeLoader


DEFAULT_SIZE = {"vocab": 32_000, "dim": 512}  # for a bare pattern, as in `plait show "(MF)3 AF"`


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds one mapping."""
    try:
        data = json.loads(read_text(path)) if path.suffix == ".json" else read_yaml(read_text(path))
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix.lstrip('.') or 'YAML'}: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    return data


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def load_design(spec: str | Path | dict[str, Any] | ModelConfig, **overrides: Any) -> ModelConfig:
    """A design from a preset's name, a pattern, a YAML/JSON file, a saved model's folder, or plain data.

    `overrides` replace top-level keys; dotted keys such as `layers.A.heads` reach further in.
    """
    data = spec.to_dict() if isinstance(spec, ModelConfig) else _plain(spec)
    return ModelConfig.from_dict(override(data, overrides))


def _plain(spec: str | Path | dict[str, Any]) -> dict[str, Any]:
    if isinstance(spec, dict):
        return spec
    if str(spec) in PRESETS:
        return PRESETS[str(spec)]
    path = Path(spec)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix in (".yaml", ".yml", ".json") or path.exists():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected a design in YAML or JSON")
        data = read_mapping(path)
        return data.get("design", data)
    try:
        parse(str(spec))
    except PatternError as error:
        if str(spec).isidentifier() or "-" in str(spec):
            raise ValueError(f"no preset, file or pattern {str(spec)!r}; {suggest(str(spec), PRESETS)}") from None
        raise error
    return {**DEFAULT_SIZE, "pattern": str(spec)}


def override(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested plain data with dotted keys set."""
    result = json.loads(json.dumps(data))
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
