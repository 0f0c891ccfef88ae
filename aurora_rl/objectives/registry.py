"""Objectives by name, and their settings in configurations."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives.function_objective import objective_from_function
from aurora_rl.objectives.objective import Objective
from aurora_rl.policies.drafter import Drafter
from aurora_rl.registry import Registry
from aurora_rl.settings import check_values

_Part = TypeVar("_Part", bound=Callable[..., Any])


def _prepared(name: str, part: Any) -> Any:
    """Make a class of a function, and give a class its name. An import path is too long for the key of a loss."""
    if ":" in name:
        name = str(getattr(part, "__dict__", {}).get("name") or getattr(part, "__name__", name))
    if inspect.isfunction(part):
        return objective_from_function(name, part)
    if isinstance(part, type) and issubclass(part, Objective):
        part.name = name
    return part


OBJECTIVES: Registry[type[Objective]] = Registry("objective", "aurora_rl.objectives", Objective, prepare=_prepared)
"""Objectives by name. The loss of an objective is "loss_<name>"."""

get_objective = OBJECTIVES.get
"""Return an objective's class by its name, an entry point, or ``package.module:Thing``: :meth:`Registry.get`."""


def register_objective(name: str) -> Callable[[_Part], _Part]:
    """Make a function or a subclass of :class:`Objective` available by name in configurations.

    A function takes the log-probabilities of target and drafter, ``[J, C, Vd]`` each, and :class:`Windows`. It returns
    values to minimize and a mask, ``[J, C]`` each. Its keywords are settings.

    Raises:
        ValueError: Another objective has the name.

    Example:
        >>> from aurora_rl.objectives import forward_kl
        >>> @register_objective("plain_kl")
        ... def plain_kl(log_p, log_q, windows, *, scale: float = 1.0):
        ...     return scale * forward_kl(log_p, log_q), windows.valid
        >>> get_objective("plain_kl").name
        'plain_kl'
    """
    return OBJECTIVES.register(name)


def check_settings(settings: Mapping[str, Any]) -> type[Objective]:
    """Return the class that a mapping of name and settings asks for, after making it once on a stand-in drafter.

    Raises:
        ValueError: No name, an unknown name or setting, or a value that the class refuses; the message names it and
            what would have been right.
    """
    # A constructor that asks more of its drafter than the stand-in has finds out when there is one.
    with contextlib.suppress(AttributeError):
        _make(settings, cast(Drafter, nn.ParameterList([torch.zeros(1)])), torch.zeros(1, 1))
    return get_objective(settings["name"])


def make_objectives(
    settings: Sequence[Mapping[str, Any]], drafter: Drafter, head: TargetHead | Tensor
) -> list[Objective]:
    """Make objectives from mappings with the name of each and its settings.

    Raises:
        ValueError: It is no list, or see :func:`check_settings`.

    Example:
        >>> from aurora_rl.testing import tiny_batch
        >>> drafter, head, _ = tiny_batch()
        >>> [objective.name for objective in make_objectives([{"name": "imitation", "steps": 3}], drafter, head)]
        ['imitation']
    """
    if isinstance(settings, str) or not isinstance(settings, Sequence):
        raise ValueError(f"objectives is {settings!r}; give a list of mappings, such as [{{'name': 'imitation'}}]")
    return [_make(each, drafter, head) for each in settings]


def _make(settings: Mapping[str, Any], drafter: Drafter, head: TargetHead | Tensor) -> Objective:
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        raise ValueError(f"an objective needs a name, got {settings!r}; give a mapping such as {{'name': 'imitation'}}")
    cls, what = get_objective(settings["name"]), f"objective {settings['name']!r}"
    arguments = {key: value for key, value in settings.items() if key != "name"}
    check_values(arguments, cls.settings(), what)
    try:
        return cls(drafter, head, **arguments)
    except (TypeError, ValueError) as error:
        # An error of a part that is named by its import path may begin with its own, shorter name.
        raise ValueError(f"{what}: {str(error).removeprefix(f'objective {cls.name!r}: ')}") from error
