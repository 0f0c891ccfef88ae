"""Values that nobody changes, and plain copies of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, NoReturn


class FrozenDict(dict[str, Any]):
    """A dictionary that cannot be changed. JSON, pickle, ``copy.deepcopy`` and ``dataclasses.asdict`` take it.

    Example:
        >>> FrozenDict(layers=2) | {"layers": 3}
        {'layers': 3}
    """

    def _refuse(self, *arguments: object, **options: object) -> NoReturn:
        raise TypeError("a configuration cannot be changed; make another by dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


def frozen(value: Any) -> Any:
    """Return a value of which nothing can be changed: tuples for lists, read-only mappings for dictionaries.

    Args:
        value: Frozen dataclass, list, tuple or mapping, of such values to any depth. All else is returned as it is.

    Example:
        >>> frozen({"layers": [1, 2]})
        {'layers': (1, 2)}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: frozen(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, Mapping):
        return FrozenDict({key: frozen(each) for key, each in value.items()})
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
