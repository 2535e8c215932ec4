"""Frozen plain data with a `kind` tag; an unknown key is an error that names the nearest known one."""

import json
import math
import os
import re
from collections.abc import Collection
from decimal import Decimal
from functools import lru_cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from plait.design.spelling import suggest

T = TypeVar("T", bound="Struct")

DERIVED: Any = None  # the default of a number that `resolve` fills in: a plain int from there on


@lru_cache(None)
def fields_of(cls: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """Asked for once for a class: working out its annotations takes longer than all else that is done with them."""
    return msgspec.structs.fields(cls)


class _Checked(type(msgspec.Struct)):
    """Constructor calls get the same errors as files: what is wrong, where, and what was probably meant."""

    def __call__(cls: Any, *args: Any, **fields: Any) -> Any:
        if args:
            raise TypeError(f"{cls.__name__} takes named values only, as in {cls.__name__}({cls._example()})")
        return convert(fields, cls, cls.__name__)

    def _example(cls) -> str:
        return ", ".join(f"{name}=..." for name in cls.__struct_fields__[:2])


class Struct(msgspec.Struct, metaclass=_Checked, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """Base of every config."""

    only_how: ClassVar[tuple[str, ...]] = ()  # fields that say how a result is computed, not what it is

    def _set(self, name: str, value: Any) -> None:
        """Put a field in its final form, in `__post_init__`."""
        msgspec.structs.force_setattr(self, name, value)

    def replace(self: T, **changes: Any) -> T:
        """A copy with some fields changed."""
        return type(self)(**{**msgspec.structs.asdict(self), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back; values equal to the defaults are left out."""
        return msgspec.json.decode(msgspec.json.encode(self))  # JSON's types alone: a tuple would not equal its list


def non_defaults(config: Struct, base: Struct | None = None) -> dict[str, Any]:
    """The kind and the fields that are not as in `base` (else: not at their defaults) and say what is built."""
    base_values = {f.name: f.default for f in fields_of(type(config))} if base is None else {}
    data: dict[str, Any] = {"kind": type(config).__struct_config__.tag or type(config).__name__}
    for name in config.__struct_fields__:
        value = getattr(config, name)
        if name not in config.only_how and value != (base_values.get(name) if base is None else getattr(base, name)):
            data[name] = non_defaults(value) if isinstance(value, Struct) else value
    return data


MAX_SIZE = 2**53  # beyond it floats skip whole numbers, so that nothing counted from it would be right
LONGEST_SHOWN = 200  # characters of a wrong value
WORDS = {
    **{"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "null": "null"},
    **{"array": "a list", "object": "a mapping"},
}


class UnknownKind(ValueError):
    """A `kind` that no layer or merge has."""

    def from_modules(self, modules: list[str]) -> "UnknownKind":
        """The same, for a design that says which modules its own layers come from."""
        if not modules:
            return self
        said = str(self).partition(";")[0]
        name = ",".join(modules)
        return UnknownKind(
            f"{said}; it is of {name}, which a saved model does not load by itself: import it first, "
            f"or say import={name}, or --import {name} to generate and eval"
        )


def words(kind: Any) -> tuple[Any, ...]:
    """The few values that a type allows, one of Literal, None and bool; none where it allows others."""
    kinds = [k for k in (get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)) if k is not type(None)]
    named = [value for k in kinds if get_origin(k) is Literal for value in get_args(k)]
    few = named and all(k is bool or get_origin(k) is Literal for k in kinds)
    return (*named, *((True, False) if bool in kinds else ())) if few else ()


def check_keys(fields: dict[str, Any], cls: type[msgspec.Struct], where: str, also: Collection[str] = ()) -> None:
    """Raise ValueError for a key, or for one of a few words, that `cls` or a struct inside it does not have."""
    types = {field.name: field.type for field in fields_of(cls)}
    for key, value in fields.items():
        if key not in types and key != "kind" and key not in also:
            raise ValueError(f"{where}: unknown key {key!r}; {suggest(str(key), [*types, *also])}")
        options = words(types.get(key))
        if options and not any(value == word and type(value) is type(word) for word in options) and value is not None:
            known = [json.dumps(option).strip('"') for option in options]
            raise ValueError(f"{where}.{key}: {value!r} does not exist; {suggest(str(value), known)}")
        for inner in (types.get(key), *get_args(types.get(key))):  # X, or each part of X | None
            if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                check_keys(value, inner, f"{where}.{key}")


def plain(value: Any) -> Any:
    """`value` in JSON's types: numbers, arrays and paths of any library become Python's numbers, lists and text, exactly.

    What has no such form stays as it is, for `convert` to say what its field takes.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    try:
        if isinstance(value, Real | Decimal):
            return int(value) if isinstance(value, Integral) else float(value)
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if callable(getattr(value, "tolist", None)):  # numpy's and torch's arrays, and those of one number
            return plain(value.tolist())
        return msgspec.to_builtins(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return value


def check_finite(data: Any, where: str) -> None:
    """Raise ValueError for NaN and infinity, which are no setting of anything and which JSON cannot hold."""
    if isinstance(data, float) and not math.isfinite(data):
        raise ValueError(f"{where}: expected a finite number, got {data}")
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list | tuple) else ()
    for key, value in inner:
        check_finite(value, f"{where}.{key}")


def convert(data: Any, cls: type[T], where: str) -> T:
    """Plain data -> `cls`, errors prefixed with where in the file it stood."""
    if isinstance(data, cls):
        return data
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a mapping, got {data!r}")
    data = plain(data)
    check_keys(data, cls, where)
    defaults = {field.name: field.default for field in fields_of(cls)}
    data = {key: value for key, value in data.items() if value is not None or defaults.get(key, 0) is not None}
    data = exact(data, cls)
    check_finite(data, where)
    try:
        return msgspec.convert(data, cls)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ValueError):  # ours, raised by a __post_init__: it says where itself
            raise error.__cause__ from None
        raise ValueError(explain(str(error), data, where)) from None
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def exact(value: Any, kind: Any) -> Any:
    """`value` with 8.0 and 1e3 as whole numbers where `kind`, a type, takes whole numbers alone."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if isinstance(value, float) and value.is_integer() and int in options and float not in options:
        return int(value)
    if not isinstance(value, dict):
        return value
    for option in options:
        if isinstance(option, type) and issubclass(option, msgspec.Struct):
            types = {field.name: field.type for field in fields_of(option)}
            return {key: exact(inner, types.get(key)) for key, inner in value.items()}
        if get_origin(option) is dict:
            return {key: exact(inner, get_args(option)[1]) for key, inner in value.items()}
    return value


COMPLAINT = re.compile(r"Expected `([^`]+)`( of length \d+)?, got `?([^`]+?)`?(?: - at (`key` in )?`\$([^`]*)`)?")


def explain(message: str, data: Any, where: str) -> str:
    """msgspec's complaint in this project's words: the field, what it takes, what it got."""
    match = COMPLAINT.fullmatch(message)
    if match is None:
        return f"{where}: {message}"
    kinds, length, found, in_keys, path = match.groups(default="")
    path, unnamed, _ = path.partition("[...]")  # a mapping's value, by which key is not said
    value = data
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        if isinstance(value, dict):
            value = value.get(name)
        elif index and isinstance(value, list | tuple):
            value = value[int(index)]
    wanted = " or ".join(WORDS.get(word, word) for word in kinds.split(" | ")) + length
    of_all = " as each key" if in_keys else " for each key" if unnamed else ""
    quotes = "; write it in quotes" if kinds == "str" and found in ("int", "float", "bool") else ""
    got = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    got = got if len(got) <= LONGEST_SHOWN else f"{got[:LONGEST_SHOWN]}..."
    return f"{where}{path}: expected {wanted}{of_all}, got {got}{quotes}"


def convert_kind(data: Any, kinds: dict[str, type[T]], where: str, hint: str = "") -> T:
    """Plain data with a `kind` (or the kind's bare name) -> the struct that kind names. `hint` ends the error for others."""
    if isinstance(data, tuple(kinds.values())):
        return data
    if isinstance(data, str):
        data = {"kind": data}
    if not isinstance(data, dict) or "kind" not in data:
        raise ValueError(f"{where}: expected a mapping with a 'kind', one of {', '.join(sorted(kinds))}; got {data!r}")
    kind = data["kind"]
    if not isinstance(kind, str) or kind not in kinds:
        near = suggest(str(kind), kinds)
        raise UnknownKind(f"{where}: unknown kind {kind!r}; {near}{'' if near.startswith('did') else hint}")
    where = f"{where} ({kind})"
    try:
        return convert(data, kinds[kind], where)
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from None


def positive(config: msgspec.Struct, *names: str) -> None:
    """Raise ValueError where a set number is not above zero, or is a whole number that is no size of anything."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:  # nor NaN
            raise ValueError(
                f"{type(config).__name__}.{name} must be above 0{' and finite' * (value != value or value > 0)}, got {value}"
            )
        if isinstance(value, int):
            at_most(config, name, MAX_SIZE)


def at_most(config: msgspec.Struct, name: str, limit: int) -> None:
    """Raise ValueError where a number is larger than anything it could be."""
    value = getattr(config, name)
    if value is not None and value > limit:
        raise ValueError(
            f"{type(config).__name__}.{name} must be at most {limit:,}, got {value:{',' if value < 1e15 else '.3g'}}"
        )


def between(config: msgspec.Struct, low: float, high: float, *names: str) -> None:
    """Raise ValueError where a set number is below `low` or above `high`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{type(config).__name__}.{name} must be between {low:,} and {high:,}, got {value}")
