"""Frozen dataclasses are the only schema; the editable ConfigDict is generated from them.

A run's life: a config file builds a dataclass, `to_config_dict` makes it a locked
`ml_collections.ConfigDict`, command-line overrides edit that, and `from_config_dict` turns it back
into frozen dataclasses, where derived values are computed and everything is validated, before
anything compiles.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from ml_collections import ConfigDict, FieldReference

T = TypeVar("T")
_SCALARS = (bool, int, float, str)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message starts with the dotted key it is about."""


def to_config_dict(config: Any) -> ConfigDict:
    """Makes a locked, editable ConfigDict of a dataclass instance.

    Optional fields may be set to None and back.  A `dict[str, Dataclass]` field takes new keys.

    Raises:
      ConfigError: a field has a type that a config cannot hold.
    """
    result = ConfigDict()
    hints = _hints(type(config))
    for field in _fields(type(config)):
        value = getattr(config, field.name)
        hint, optional = _split_optional(hints[field.name])
        if isinstance(value, dict):
            value = ConfigDict({k: _plain(v, f"{field.name}.{k}") for k, v in value.items()})
        else:
            value = _plain(value, field.name)
        if optional:
            # A reference remembers the type while it holds None, and accepts None again.
            result[field.name] = FieldReference(value, field_type=_held_type(hint))
        else:
            result[field.name] = value
    _lock(result)
    return result


def from_config_dict(cls: type[T], values: ConfigDict | Mapping[str, Any], path: str = "") -> T:
    """Builds the frozen dataclass `cls` from a ConfigDict, or from a mapping read from JSON.

    An int is accepted for a float and a list for a tuple.  A key that is absent takes the field's
    default.  Where a class defines `validate(self)`, it is called on every instance, innermost
    first; a ConfigError("key: why") it raises gets the path in front.

    Args:
      path: dotted key of `values` in the whole, for messages.

    Raises:
      ConfigError: unknown key (names the nearest known one), wrong type, missing key, or what
        `validate` raised.
    """
    if not isinstance(values, (Mapping, ConfigDict)):
        raise ConfigError(f"{path or cls.__name__}: expected {cls.__name__}, got {values!r}")
    known = {f.name: f for f in _fields(cls)}
    hints = _hints(cls)
    arguments = {}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            hint = f"; did you mean {_join(path, near[0])}?" if near else ""
            raise ConfigError(f"{_join(path, name)}: unknown key{hint}")
        arguments[name] = _convert(hints[name], values[name], _join(path, name))
    for name, field in known.items():
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if name not in arguments and no_default:
            raise ConfigError(f"{_join(path, name)}: missing, and it has no default")
    try:
        result = cls(**arguments)
        if hasattr(result, "validate"):
            result.validate()
    except ConfigError as error:
        raise ConfigError(_join(path, str(error))) from None
    return result


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint`, or ConfigError."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, path)
    if dataclasses.is_dataclass(hint):
        return from_config_dict(hint, value, path)
    if origin is Literal:
        # 1 == True == 1.0, so compare types too.
        if any(value == a and type(value) is type(a) for a in typing.get_args(hint)):
            return value
        allowed = ", ".join(repr(a) for a in typing.get_args(hint))
        near = difflib.get_close_matches(str(value), map(str, typing.get_args(hint)), n=1)
        hint_text = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{path}: must be one of {allowed}, got {value!r}{hint_text}")
    if origin is tuple:
        return _convert_tuple(typing.get_args(hint), value, path)
    if origin is dict:
        if not isinstance(value, (Mapping, ConfigDict)):
            raise ConfigError(f"{path}: expected a mapping, got {value!r}")
        of = typing.get_args(hint)[1]
        return {k: _convert(of, value[k], f"{path}.{k}") for k in value}
    if hint is float and type(value) is int:
        return float(value)
    if hint is type(None) and value is None:
        return None
    if hint in _SCALARS and type(value) is hint:
        return value
    if hint not in _SCALARS and hint is not type(None):
        raise ConfigError(f"{path}: a config cannot hold the type {hint}")
    raise ConfigError(f"{path}: expected {_name(hint)}, got {_name(type(value))} {value!r}")


def _convert_union(members: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in members:
        return None
    members = tuple(m for m in members if m is not type(None))
    if len(members) == 1:
        return _convert(members[0], value, path)
    # The exact type first, so that 1 stays an int in `float | int`.
    members = tuple(sorted(members, key=lambda m: type(value) is not m))
    for member in members:
        try:
            return _convert(member, value, path)
        except ConfigError:
            continue
    names = " or ".join(_name(m) for m in members)
    raise ConfigError(f"{path}: expected {names}, got {_name(type(value))} {value!r}")


def _convert_tuple(of: tuple[Any, ...], value: Any, path: str) -> tuple:
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{path}: expected a tuple, got {_name(type(value))} {value!r}")
    if len(of) == 2 and of[1] is Ellipsis:
        of = (of[0],) * len(value)
    elif len(of) != len(value):
        raise ConfigError(f"{path}: expected {len(of)} values, got {len(value)}")
    return tuple(
        _convert(t, v, f"{path}[{i}]") for i, (t, v) in enumerate(zip(of, value, strict=True))
    )


def _plain(value: Any, path: str) -> Any:
    """A dataclass as an (unlocked) ConfigDict, a scalar or tuple of them as itself."""
    if dataclasses.is_dataclass(value):
        return to_config_dict(value)
    if isinstance(value, (tuple, list)):
        return tuple(_plain(v, path) for v in value)
    if value is None or type(value) in _SCALARS:
        return value
    raise ConfigError(f"{path}: a config cannot hold {_name(type(value))} {value!r}")


def _held_type(hint: Any) -> type:
    """The Python type that a ConfigDict checks assignments to an Optional field against."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) or origin is dict:
        return ConfigDict
    if origin is Literal:
        return type(typing.get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return object
    return origin or hint


def _lock(config: ConfigDict) -> None:
    """Locks all but the mappings by name (`dict[str, Dataclass]`), whose keys are the user's."""
    named = {k: v for k, v in config.items() if isinstance(v, ConfigDict) and not v.is_locked}
    config.lock()
    for group in named.values():
        members = list(group.values())
        group.unlock()
        for member in members:
            if isinstance(member, ConfigDict):
                member.lock()


def _split_optional(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    members = typing.get_args(hint)
    rest = tuple(m for m in members if m is not type(None))
    return (rest[0] if len(rest) == 1 else Union[rest]), len(rest) < len(members)  # noqa: UP007


def _fields(cls: type) -> list[dataclasses.Field]:
    """Fields one may set; derived ones (`init=False`) are computed again."""
    return [f for f in dataclasses.fields(cls) if f.init]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
