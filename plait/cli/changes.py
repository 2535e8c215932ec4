"""Trailing `key=value` arguments as data."""

import re
from collections.abc import Iterable
from typing import Any

import yaml

from plait.design.layers import LETTERS
from plait.design.load import read_yaml

KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
TEXT = ("pattern", "design")  # "[M|A]" would be a list in YAML


def read_changes(arguments: Iterable[str]) -> dict[str, Any]:
    """`["lr=3e-4", "layers.A.heads=2"]` -> values by key, read as YAML. Raises ValueError for what is no key=value."""
    changes = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not KEY.fullmatch(key):
            raise ValueError(f"{argument!r}: expected key=value, such as dim=768 or layers.A.heads=4")
        changes[key] = value if key.rpartition(".")[2] in TEXT else read_value(key, value)
    return changes


def read_value(key: str, text: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{key}={text}: cannot be read as YAML: {' '.join(str(error).split())}") from None


def reach_letters(changes: dict[str, Any], layers: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """`changes`, outer keys first, where "layers.A.heads" reaches into the default A unless `layers` binds A itself."""
    inner = [re.fullmatch(rf"{re.escape(prefix)}layers\.(\w+)\.\w.*", key) for key in changes]
    letters = {match[1] for match in inner if match} & LETTERS.keys() - set(layers)
    told = {f"{prefix}layers.{letter}" for letter in letters}
    defaults = {key: LETTERS[key.rpartition(".")[2]].to_dict() for key in sorted(told) if f"{key}.kind" not in changes}
    return dict(sorted((defaults | changes).items(), key=lambda change: change[0].count(".")))
