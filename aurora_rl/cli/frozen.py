"""Values that nobody changes, and plain copies of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any


def frozen(value: Any) -> Any:
    """Return a value of which nothing can be changed: tuples for lists, read-only mappings for dictionaries.

    Args:
        value: Frozen dataclass, list, tuple or mapping, of such values to any depth. All else is returned as it is.

    Example:
        >>> frozen({"layers": [1, 2]})
        mappingproxy({'layers': (1, 2)})
    """
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: frozen(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, Mapping):
        return MappingProxyType({key: frozen(each) for key, each in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(map(frozen, value))
    return value


def plain(value: Any) -> Any:
    """Return a copy of a frozen value in dictionaries and lists, as JSON, YAML and constructors take it.

    Example:
        >>> plain(frozen({"layers": [1, 2]}))
        {'layers': [1, 2]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(plain, value))
    return value
