"""Frozen plain data with a `kind` tag; an unknown key is an error that names the nearest known one."""

import math
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import msgspec

from plait.design.spelling import suggest

T = TypeVar("T", bound="Struct")


class _Checked(type(msgspec.Struct)):
    """Constructor calls get the same errors as files: what is wrong, where, and what was probably meant."""

    def __call__(cls: Any, *args: Any, **fields: Any) -> Any:
        if args:
            raise TypeError(f"{cls.__name__} takes named values only, as in {cls.__name__}({cls._example()})")
        return convert(msgspec.to_builtins(fields), cls, cls.__name__)

    def _example(cls) -> str:
        return ", ".join(f"{name}=..." for name in cls.__struct_fields__[:2])


class Struct(msgspec.Struct, metaclass=_Checked, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """Base of every config."""

    only_how: ClassVar[tuple[str, ...]] = ()  # fields that say how a result is computed, not what it is

    def replace(self: T, **changes: Any) -> T:
        """A copy with some fields changed."""
        return type(self)(**{**msgspec.structs.asdict(self), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back; values equal to the defaults are left out."""
        return msgspec.json.decode(msgspec.json.encode(self))  # JSON's types alone: a tuple would not equal its list


def check_keys(fields: dict[str, Any], cls: type[msgspec.Struct], where: str) -> None:
    """Raise ValueError for a key, or for one of a few words, that `cls` or a struct inside it does not have."""
    types = {field.name: field.type for field in msgspec.structs.fields(cls)}
    for key, value in fields.items():
        if key not in types and key != "kind":
            raise ValueError(f"{where}: unknown key {key!r}; {suggest(key, types)}")
        options = get_args(types[key]) if key in types and get_origin(types[key]) is Literal else ()
        if options and value not in options:
            raise ValueError(f"{where}.{key}: {value!r} does not exist; {suggest(str(value), map(str, options))}")
        for inner in (types.get(key), *get_args(types.get(key))):  # X, or each part of X | None
            if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                check_keys(value, inner, f"{where}.{key}")


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
    check_keys(data, cls, where)
    check_finite(data, where)
    try:
        return msgspec.convert(data, cls)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ValueError):  # ours, raised by a __post_init__: it says where itself
            raise error.__cause__ from None
        raise ValueError(f"{where}: {error}") from None
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def convert_kind(data: Any, kinds: dict[str, type[T]], where: str, hint: str = "") -> T:
    """Plain data with a `kind` (or the kind's bare name) -> the struct that kind names. `hint` ends the error for others."""
    if isinstance(data, tuple(kinds.values())):
        return data
    if isinstance(data, str):
        data = {"kind": data}
    if not isinstance(data, dict) or "kind" not in data:
        raise ValueError(f"{where}: expected a mapping with a 'kind', one of {', '.join(sorted(kinds))}; got {data!r}")
    kind = data["kind"]
    if kind not in kinds:
        raise ValueError(f"{where}: unknown kind {kind!r}; {suggest(str(kind), kinds)}{hint}")
    return convert(data, kinds[kind], f"{where} ({kind})")


def positive(config: msgspec.Struct, *names: str) -> None:
    """Raise ValueError where a set number is not above zero."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{type(config).__name__}.{name} must be above 0, got {value}")


def between(config: msgspec.Struct, low: float, high: float, *names: str, where: str = "") -> None:
    """Raise ValueError where a set number is below `low` or above `high`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(
                f"{where or type(config).__name__}.{name} must be between {low:,} and {high:,}, got {value}"
            )
