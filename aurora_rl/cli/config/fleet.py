"""The members of a fleet, as its section of the configuration describes them, and checks of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from aurora_rl.cli.config.schema import Config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.frozen import plain
from aurora_rl.settings import check_values, settings_of


@dataclass(frozen=True)
class Placement:
    """A member's share of a node, and its own part of the configuration.

    Attributes:
        num_cpus: CPUs that Ray reserves, also the threads of the member unless ``overrides`` says otherwise.
        num_gpus: GPUs that Ray reserves; the member sees no others.
        resources: Custom resources by name.
        overrides: ``key=value`` pairs.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: Mapping[str, Any] = field(default_factory=dict)
    overrides: list = field(default_factory=list)

    @property
    def demand(self) -> dict[str, float]:
        """Amounts above 0 by Ray's names.

        Example:
            >>> Placement(num_gpus=1, resources={"rack-a": 0.5}).demand
            {'CPU': 1.0, 'GPU': 1, 'rack-a': 0.5}
        """
        amounts = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return {name: amount for name, amount in amounts.items() if amount}


@dataclass(frozen=True)
class EngineGroup(Placement):
    """``replicas`` engines that are alike."""

    replicas: int = 1


def engine_groups(config: Config) -> dict[str, EngineGroup]:
    """Return the groups of engines by name; errors as of :func:`check_fleet`.

    Example:
        >>> from aurora_rl.cli.config import load_config
        >>> engine_groups(load_config(overrides=["fleet.engines.chat.replicas=2"]))["chat"].replicas
        2
    """
    groups = {}
    for name, settings in config.fleet.engines.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(name)):
            raise ConfigError(f"fleet.engines: a name has letters, digits, - and _, got {name!r}")
        group = groups[str(name)] = _read(settings, EngineGroup, f"fleet.engines.{name}")
        if group.replicas < 1:
            raise ConfigError(f"fleet.engines.{name}.replicas must be at least 1, got {group.replicas}")
    return groups


def learner_placement(config: Config) -> Placement:
    """Return the placement of the learner; errors as of :func:`check_fleet`."""
    return _read(config.fleet.learner, Placement, "fleet.learner")


def check_fleet(config: Config) -> None:
    """Raise ConfigError if a setting of a member is unknown, of another type or out of range."""
    fleet = config.fleet
    engine_groups(config)
    learner_placement(config)
    if fleet.max_restarts is not None and fleet.max_restarts < 0:
        raise ConfigError(f"fleet.max_restarts must not be negative, or be null, got {fleet.max_restarts}")
    if not fleet.timeout > 0:
        raise ConfigError(f"fleet.timeout must be a number of seconds above 0, got {fleet.timeout}")
    if fleet.address is not None and not re.fullmatch(r"auto|[^\s/]+:\d+", fleet.address):
        raise ConfigError(
            f"fleet.address must be auto, host:port or null, got {fleet.address!r}; from outside of the cluster start "
            "the fleet by `ray job submit`"
        )


_Kind = TypeVar("_Kind", bound=Placement)


def _read(settings: Any, kind: type[_Kind], name: str) -> _Kind:
    values = plain(settings)
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must be a mapping, such as {{num_cpus: 4}}, got {values!r}")
    try:
        check_values(values, settings_of(kind), name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    placement = kind(**values)
    amounts = [(each.name, getattr(placement, each.name)) for each in fields(placement) if each.name.startswith("num_")]
    for key, amount in [*amounts, *((f"resources.{key}", amount) for key, amount in placement.resources.items())]:
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount < float("inf"):
            raise ConfigError(f"{name}.{key} must be a number that is not negative, got {amount!r}")
        if amount > 1 and amount != int(amount):  # Ray's own rule
            raise ConfigError(f"{name}.{key} must be whole above 1, got {amount!r}")
    if reserved := {"CPU", "GPU"} & placement.resources.keys():
        key = min(reserved)
        raise ConfigError(f"{name}.resources has {key}; set {name}.num_{key.lower()}s")
    if wrong := [pair for pair in placement.overrides if not isinstance(pair, str)]:
        raise ConfigError(f"{name}.overrides must be a list of key=value, such as [engine.slots=4], got {wrong[0]!r}")
    return placement
