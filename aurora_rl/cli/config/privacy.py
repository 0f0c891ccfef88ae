"""Checks of privacy, and what it demands of other keys."""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter

from omegaconf import DictConfig, OmegaConf

from aurora_rl.cli.arguments import as_pair
from aurora_rl.cli.config.schema import Config
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.tenants import check_tenant

# Each keeps texts after their gradient step.
_KEPT = ("engine.prefix_cache_tokens", "drafter.history", "learner.replay")


def keep_nothing(merged: DictConfig, named: Collection[str]) -> None:
    """Set to 0 what zero retention does without, but for keys that were named: :func:`check_privacy` refuses those."""
    if merged.privacy.zero_retention:
        for key in set(_KEPT) - set(named):
            OmegaConf.update(merged, key, 0)


def check_records(config: Config) -> None:
    """Raise ConfigError where a command whose purpose is a recording is to keep nothing."""
    if config.privacy.zero_retention:
        raise ConfigError(
            "privacy.zero_retention=true writes no text to disk, and this command records what it serves; leave it out"
        )


def check_privacy(config: Config) -> None:
    """Raise ConfigError if a tenant's name is none, an age is out of range, or a key keeps what must not be kept."""
    with naming("privacy.opt_out"):
        for name in config.privacy.opt_out:
            check_tenant(name)
    if config.privacy.opt_out and config.engine.remote and config.http.port is None:
        raise ConfigError(
            f"privacy.opt_out={list(config.privacy.opt_out)} needs requests to come through our front, which knows "
            f"their tenants: set http.port, or, as vLLM has none, have clients opt out "
            f"(engine.name={config.engine.name})"
        )
    if config.privacy.max_age is not None and not 0 < config.privacy.max_age < float("inf"):
        raise ConfigError(f"privacy.max_age={config.privacy.max_age} must be a number of seconds above 0, or null")
    if not config.privacy.zero_retention:
        return
    for key in _KEPT:
        if value := attrgetter(key)(config):
            raise ConfigError(f"privacy.zero_retention=true keeps nothing, got {as_pair(key, value)}; set {key}=0")
    for key, fix in (("learner.recording", "leave it out"), ("checkpoint.buffer", "set it to false")):
        if (value := attrgetter(key)(config)) not in (None, False):
            raise ConfigError(f"privacy.zero_retention=true writes no text to disk, got {as_pair(key, value)}; {fix}")
    if config.engine.remote:
        raise ConfigError(
            "privacy.zero_retention=true needs an engine in this process, got engine.name="
            f"{config.engine.name}, whose prefix cache and log are out of reach; set engine.name=transformers"
        )
