"""Hooks around methods of another library's classes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_aurora_rl"


def wrap(owner: type, name: str, hook: Callable[..., Any]) -> None:
    """Put a hook around a method, once: it is called with the method itself and then the method's arguments.

    Example:
        >>> class Engine:
        ...     def step(self, number):
        ...         return number
        >>> for _ in range(2):
        ...     wrap(Engine, "step", lambda step, engine, number: step(engine, number) + 1)
        >>> Engine().step(1), is_wrapped(Engine, "step")
        (2, True)
    """
    original = getattr(owner, name)
    if is_wrapped(owner, name):
        return

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    setattr(hooked, _MARK, True)
    setattr(owner, name, hooked)


def is_wrapped(owner: type, name: str) -> bool:
    """Return whether a hook of ours is what callers of a method meet first."""
    return _MARK in vars(getattr(owner, name, None) or object)
