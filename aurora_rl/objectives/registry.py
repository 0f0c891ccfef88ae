"""Objectives by name, and what a configuration says of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives.objective import Objective
from aurora_rl.policies.drafter import Drafter
from aurora_rl.settings import check, nearest, settings_of

_ENTRY_POINTS = "aurora_rl.objectives"
# Arguments of the constructor that no configuration gives.
_NOT_SETTINGS = ("drafter", "head", "reduction")

OBJECTIVES: dict[str, type[Objective]] = {}

_O = TypeVar("_O", bound=type[Objective])


def register_objective(name: str) -> Callable[[_O], _O]:
    """Class decorator: make an objective available by name in configurations.

    A package makes its own known without being imported first by an entry point of the group
    ``aurora_rl.objectives`` whose name is the objective's and whose value its class.

    Args:
        name: of the objective; its loss is "loss_<name>".

    Raises:
        ValueError: another class has the name. One that is defined again, as a notebook's is, replaces itself.

    Example:
        >>> from aurora_rl.objectives import ImitationLoss
        >>> @register_objective("short_imitation")
        ... class ShortImitation(ImitationLoss):
        ...     pass
        >>> get_objective("short_imitation").__name__, OBJECTIVES.pop("short_imitation").name
        ('ShortImitation', 'short_imitation')
    """

    def register(cls: _O) -> _O:
        known, new = (f"{c.__module__}.{c.__qualname__}" for c in (OBJECTIVES.get(name, cls), cls))
        if known != new:
            raise ValueError(f"the objective name {name!r} belongs to {known}; choose another for {new}")
        cls.name = name
        OBJECTIVES[name] = cls
        return cls

    return register


def get_objective(name: str) -> type[Objective]:
    """The class of a registered objective, of an entry point, or of ``package.module:Class``.

    Raises:
        ValueError: there is none of the name, or it is no objective; the message names the nearest.

    Example:
        >>> get_objective("imitation").__name__
        'ImitationLoss'
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    imported = ":" in name.strip(":")
    if imported:
        point = EntryPoint(name=name, value=name, group=_ENTRY_POINTS)
    else:
        found = {point.name: point for point in entry_points(group=_ENTRY_POINTS)}
        if name not in found:
            known = sorted({*OBJECTIVES, *found})
            # A path with a dot in the place of the colon is no misspelled name.
            near = ":".join(name.rsplit(".", 1)) if "." in name.strip(".") else nearest(name, known)
            raise ValueError(
                f"no objective is called {name!r}; did you mean {near!r}? There are {', '.join(known)}, and any "
                "package.module:Class"
            )
        point = found[name]
    try:
        cls = point.load()
    except Exception as error:  # whatever a module does when it is imported
        raise ValueError(f"the objective {name!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise ValueError(f"the objective {name!r} is {point.value}, which is no subclass of Objective")
    if not imported:
        cls.name = name
    elif "name" not in vars(cls):  # never registered: its entries are called after the class
        cls.name = cls.__name__
    return cls


def check_settings(settings: Mapping[str, Any]) -> type[Objective]:
    """The class that a mapping of name and settings asks for, which has been made once on a stand-in for a drafter.

    Raises:
        ValueError: no name, an unknown name or setting, or a value that the class refuses; the message names it and
            what would have been right.
    """
    # A constructor that asks more of its drafter than the stand-in has finds out when there is one.
    with contextlib.suppress(AttributeError):
        _make(settings, cast(Drafter, nn.ParameterList([torch.zeros(1)])), torch.zeros(1, 1))
    return get_objective(settings["name"])


def make_objectives(
    settings: Sequence[Mapping[str, Any]], drafter: Drafter, head: TargetHead | Tensor
) -> list[Objective]:
    """Objectives from a list of mappings: a name each, and the class's keyword arguments.

    Args:
        settings: such as ``[{"name": "imitation", "steps": 3}]``.
        drafter: see :class:`Objective`.
        head: see :class:`Objective`.

    Raises:
        ValueError: see :func:`check_settings`.

    Example:
        >>> from aurora_rl.policies import Eagle3Drafter, TargetParts
        >>> from aurora_rl.testing import tiny_target
        >>> parts = TargetParts.of(tiny_target())
        >>> drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(16))
        >>> [objective.name for objective in make_objectives([{"name": "imitation", "steps": 3}], drafter, parts.head)]
        ['imitation']
    """
    return [_make(each, drafter, head) for each in settings]


def _make(settings: Mapping[str, Any], drafter: Drafter, head: TargetHead | Tensor) -> Objective:
    if not isinstance(settings.get("name"), str):
        raise ValueError(f"an objective needs a name, got {dict(settings)}")
    cls, what = get_objective(settings["name"]), f"objective {settings['name']!r}"
    arguments = {key: value for key, value in settings.items() if key != "name"}
    check(arguments, {name: kind for name, kind in settings_of(cls).items() if name not in _NOT_SETTINGS}, what)
    try:
        return cls(drafter, head, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error
