"""Settings of a configuration: which keywords a class or function takes, and of which types."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    NoneType: "null",
    Mapping: "a mapping",
    list: "a list",
    Callable: "a function",
}


def settings_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the keywords that a function or a constructor takes, each with its type, or ``Any`` without a type.

    A constructor that takes ``**settings`` is taken to pass them to its parent, whose keywords count too.

    Example:
        >>> class Parent:
        ...     def __init__(self, drafter, *, steps: int = 3) -> None: ...
        >>> class Child(Parent):
        ...     def __init__(self, drafter, *, gamma: float = 1.0, **settings) -> None: ...
        >>> settings_of(Child)
        {'drafter': typing.Any, 'gamma': <class 'float'>, 'steps': <class 'int'>}
    """
    found: dict[str, Any] = {}
    functions = [target]
    if isinstance(target, type):  # the constructors along its method resolution order
        functions = [vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base)]
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        try:
            types = get_type_hints(function)
        except NameError:  # a type that is imported for checkers alone
            types = {}
        for p in parameters:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self":
                found.setdefault(p.name, types.get(p.name, Any))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the most similar of the known names, whatever their case; None if none is near enough to be a misspelling.

    Example:
        >>> nearest("forwardkl", ["reverse_kl", "forward_kl"]), nearest("EAGLE3", ["eagle", "eagle3"])
        ('forward_kl', 'eagle3')
        >>> nearest("nope", ["standalone"]) is None
        True
    """
    names = {each.casefold(): each for each in known}
    close = difflib.get_close_matches(name.casefold(), names, 1)
    return names[close[0]] if close else None


def check_values(settings: Mapping[str, Any], known: Mapping[str, Any], what: str) -> None:
    """Refuse settings that do not exist, and values of another type.

    Args:
        settings: Values by name.
        known: Types by name, see :func:`settings_of`.
        what: Owner of the settings, for the message.

    Raises:
        ValueError: The message names the setting, and a near one, all that there are, or the type.
    """
    for key, value in settings.items():
        if key not in known:
            near = nearest(str(key), known)
            cure = f"did you mean {near!r}?" if near else f"it has {', '.join(known) or 'none'}"
            raise ValueError(f"{what} has no setting {key!r}; {cure}")
        hint = known[key]
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if not any(_is(value, get_origin(kind) or kind) for kind in kinds):
            wanted = " or ".join(_NAMES.get(get_origin(kind) or kind, str(kind)) for kind in kinds)
            raise ValueError(f"{what}: {key} must be {wanted}, got {value!r}")


def _is(value: Any, kind: Any) -> bool:
    if kind in (int, float):  # 1 is a number too; true is not a number, though Python's bool is an int
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    # Any, a Literal or a type variable is for the class to judge.
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)
