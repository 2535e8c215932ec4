"""Trailing `key=value` arguments as data."""

import re
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from plait.design import ModelConfig, load_design
from plait.design.imports import asked, load_modules
from plait.design.layers import LETTERS
from plait.design.load import find_design
from plait.design.yaml_core import read_yaml

KEY = re.compile(r"[^\W\d]\w*(\.\w+(#\d+)?)*")  # with addresses: at.A#5.heads


def changed_design(spec: str, arguments: Iterable[str]) -> ModelConfig:
    """A design by any of its names (`load_design`) with `key=value` changes to it."""
    given = read_changes(arguments, ModelConfig)
    load_modules(asked(given))
    bound = find_design(spec)[0].get("layers") or ()
    return load_design(spec, **reach_letters(given, bound))


def read_changes(arguments: Iterable[str], config: type, inside: dict[str, type] | None = None) -> dict[str, Any]:
    """`["lr=3e-4", "layers.A.heads=2"]` -> values by key: text as it stands where `config` takes text there, else YAML.

    inside: the configs that fields hold as plain data. Raises ValueError for what is no key=value, and for a key given twice.
    """
    changes: dict[str, Any] = {}
    for argument in whole(arguments):
        key, equals, value = argument.partition("=")
        if not equals or not KEY.fullmatch(key):
            raise ValueError(f"{argument!r}: expected key=value, such as dim=768 or layers.A.heads=4")
        if key in changes:
            raise ValueError(f"{argument!r}: {key} is given twice")
        changes[key] = read_value(key, value, type_of(key.split("."), config, inside or {}))
    return changes


def whole(arguments: Iterable[str]) -> Iterator[str]:
    """The arguments, those that a shell has cut at spaces inside brackets put together again: `lora={rank: 16}`."""
    held: list[str] = []
    for argument in arguments:
        held.append(argument)
        value = " ".join(held).partition("=")[2]
        if value[:1] not in ("{", "[") or all(value.count(a) <= value.count(b) for a, b in ("{}", "[]")):
            yield " ".join(held)
            held = []
    yield from held  # never closed: each for itself


def read_value(key: str, text: str, kind: Any) -> Any:
    """`text` as a value of `kind`, a type: what YAML sees in it, or itself where text is taken and that is not."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    taken = {type(word) for option in options for word in get_args(option) if get_origin(option) is Literal}
    taken |= {get_origin(option) or option for option in options} - {Literal}
    try:
        value = read_yaml(text)
    except ValueError as error:
        if str in taken:
            return text
        raise ValueError(f"{key}={text}: cannot be read as YAML: {error}") from None
    for name, inner in value.items() if isinstance(value, dict) else ():
        if inner is None and ":" in str(name):  # {rank:4} is a key without a value
            raise ValueError(f"{key}={text}: YAML wants a space after the colon: {str(name).replace(':', ': ', 1)}")
    return text if str in taken and type(value) not in taken - {str} else value


def type_of(names: list[str], config: Any, inside: dict[str, type]) -> Any:
    """The type that a config has for a dotted key; Any where it says none."""
    if not (isinstance(config, type) and issubclass(config, msgspec.Struct)):
        return Any
    fields = {field.name: field for field in msgspec.structs.fields(config)}
    name, *rest = names
    if name not in fields:
        return Any
    declared = fields[name].type
    if not rest:
        return str | dict | None if name in inside else declared
    options = (inside.get(name), declared, *get_args(declared), type(fields[name].default))
    structs = [option for option in options if isinstance(option, type) and issubclass(option, msgspec.Struct)]
    return type_of(rest, structs[0], inside) if structs else Any


def reach_letters(changes: dict[str, Any], layers: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """`changes`, outer keys first, where "layers.A.heads" reaches into the default A unless `layers` binds A itself."""
    inner = [re.fullmatch(rf"{re.escape(prefix)}layers\.(\w+)\.\w.*", key) for key in changes]
    letters = {match[1] for match in inner if match} & LETTERS.keys() - set(layers)
    defaulted = {f"{prefix}layers.{letter}" for letter in letters}
    defaults = {
        key: LETTERS[key.rpartition(".")[2]].to_dict() for key in sorted(defaulted) if f"{key}.kind" not in changes
    }
    return dict(sorted((defaults | changes).items(), key=lambda change: change[0].count(".")))
