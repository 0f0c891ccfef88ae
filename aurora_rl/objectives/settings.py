"""Settings of a configuration: which keywords a class or function takes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


def settings_of(target: Callable[..., Any]) -> list[str]:
    """Keywords that a function or a class's constructor takes.

    A constructor that takes ``**settings`` is taken to pass them to its parent, whose keywords count too.

    Example:
        >>> class Parent:
        ...     def __init__(self, drafter, *, steps: int = 3) -> None: ...
        >>> class Child(Parent):
        ...     def __init__(self, drafter, *, gamma: float = 1.0, **settings) -> None: ...
        >>> settings_of(Child)
        ['drafter', 'gamma', 'steps']
    """
    found: list[str] = []
    for function in _chain(target):
        parameters = inspect.signature(function).parameters.values()
        kinds = {p.name: p.kind for p in parameters}
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        found += [name for name, kind in kinds.items() if kind not in variadic and name not in ("self", *found)]
        if inspect.Parameter.VAR_KEYWORD not in kinds.values():
            break
    return found


def _chain(target: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The function, or the constructors along the class's method resolution order."""
    if isinstance(target, type):
        yield from (vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base))
    else:
        yield target


def nearest(name: str, known: Iterable[str]) -> str:
    """The most similar of the known names, of which there must be one.

    Example:
        >>> nearest("forwardkl", ["reverse_kl", "forward_kl"])
        'forward_kl'
    """
    return difflib.get_close_matches(name, list(known), 1, 0)[0]


def check_names(settings: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    """Refuse a setting that does not exist.

    Args:
        settings: name to value.
        known: names that there are.
        what: has the settings, for the message.

    Raises:
        ValueError: an unknown setting; the message names the nearest.
    """
    names = list(known)
    for key in settings:
        if key not in names:
            cure = f"did you mean {nearest(str(key), names)!r}?" if names else "it has none"
            raise ValueError(f"{what} has no setting {key!r}; {cure}")
