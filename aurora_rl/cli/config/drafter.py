"""Checks of the drafter's values."""

from __future__ import annotations

from aurora_rl.cli.config.schema import Config
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.remote_engines import REMOTE_ENGINES
from aurora_rl.tenants import check_adapters


def check_drafter_config(config: Config) -> None:
    """Raise ConfigError if values of ``drafter`` do not go together, or not with the engine."""
    drafter, options = config.drafter, config.drafter.options
    old = [name for name in ("learned", "lookup", "learned_options", "min_depth") if name in options]
    if drafter.name == "hybrid" or (drafter.name is None and old):
        was = "drafter.name=hybrid" if drafter.name else f"drafter.options.{old[0]} of the drafter hybrid"
        now = f"drafter.name={options.get('learned', 'medusa')} drafter.lookup={options.get('lookup', 2)}"
        raise ConfigError(f"{was} is {now} now, and its learned_options are drafter.options")
    layers = list(drafter.feature_layers or ())
    if sorted(set(layers)) != layers:
        raise ConfigError(f"drafter.feature_layers must rise, as engines join states in that order, got {layers}")
    if not drafter.adapters:
        return
    named, engine = f"drafter.adapters={list(drafter.adapters)}", config.engine.name
    if config.engine.remote:
        raise ConfigError(
            f"{named}: {REMOTE_ENGINES[engine]} keeps one drafter for all requests; leave the key out, or set "
            "engine.name=transformers"
        )
    if config.compare:
        raise ConfigError(f"{named} next to compare={list(config.compare)}: leave one of them out")
    with naming("drafter.adapters"):
        check_adapters(drafter.adapters)
