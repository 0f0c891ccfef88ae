"""Drafters by name: those of this package, of installed packages, and any class by its import path."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from aurora_rl.policies.drafter import Drafter

logger = logging.getLogger(__name__)

D = TypeVar("D", bound=type[Drafter])
_DRAFTERS: dict[str, type[Drafter]] = {}
_ENTRY_POINTS = "aurora_rl.drafters"
OWN_NAME = "aurora_rl_drafter"
"""Entry of a ``config.json`` that names the drafter where the architectures, those of engines, would not tell it."""


def register_drafter(name: str) -> Callable[[D], D]:
    """Class decorator: make a drafter available by name in configurations.

    A package makes its own known without being imported first by an entry point of the group ``aurora_rl.drafters``
    whose name is the drafter's and whose value its class.

    Raises:
        ValueError: another class has the name.
    """

    def register(cls: D) -> D:
        known = _DRAFTERS.setdefault(name, cls)
        # A module that is run again defines the same class again.
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the drafter name {name!r} belongs to {known.__module__}:{known.__qualname__}")
        _DRAFTERS[name] = cls
        return cls

    return register


def available_drafters() -> list[str]:
    """Names that :func:`get_drafter` knows, sorted: those registered, and the entry points of installed packages.

    Example:
        >>> {"eagle3", "eagle", "medusa", "standalone", "ngram"} <= set(available_drafters())
        True
    """
    return sorted({*_DRAFTERS, *(point.name for point in entry_points(group=_ENTRY_POINTS))})


def get_drafter(name: str) -> type[Drafter]:
    """The class of a registered drafter, of an entry point, or of ``package.module:Class``.

    Raises:
        ValueError: there is none of the name, or it is no drafter; the message names the nearest.

    Example:
        >>> get_drafter("medusa").__name__
        'MedusaDrafter'
    """
    if name in _DRAFTERS:
        return _DRAFTERS[name]
    if ":" in name.strip(":"):
        point = EntryPoint(name=name, value=name, group=_ENTRY_POINTS)
    else:
        found = {point.name: point for point in entry_points(group=_ENTRY_POINTS)}
        if name not in found:
            known = available_drafters()
            near = difflib.get_close_matches(name, known, 1, 0)[0]
            raise ValueError(
                f"no drafter is called {name!r}; did you mean {near!r}? There are {', '.join(known)}, and any "
                "package.module:Class"
            )
        point = found[name]
    try:
        cls = point.load()
    except Exception as error:  # whatever a module does when it is imported
        raise ValueError(f"the drafter {name!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Drafter)):
        raise ValueError(f"the drafter {name!r} is {point.value}, which is no subclass of aurora_rl.policies.Drafter")
    if inspect.isabstract(cls):
        raise ValueError(
            f"the drafter {name!r} is {point.value}, which lacks {', '.join(sorted(cls.__abstractmethods__))}"
        )
    return cls


def recognized(config: Mapping[str, Any]) -> type[Drafter]:
    """The class that wrote, or would write, a drafter's ``config.json``.

    Raises:
        ValueError: no class knows its architectures.

    Example:
        >>> recognized({"architectures": ["LlamaForCausalLMEagle3"]}).__name__
        'Eagle3Drafter'
    """
    # Known names only: a file from elsewhere must not say what is imported.
    names, own = available_drafters(), config.get(OWN_NAME)
    for name in [own] if own in names else names:
        try:
            kind = get_drafter(name)
        except ValueError as error:  # some installed package's, which need not be the one that is asked for
            logger.warning("%s; its checkpoints are not recognized", error)
            continue
        if kind.formats and kind.recognizes(config):
            return kind
    raise ValueError(
        f"config.json: no drafter is of architectures {config.get('architectures')}; there are "
        f"{', '.join(available_drafters())}, and any that drafter.name=package.module:Class names"
    )
