"""Checks of trials on live traffic, of new weights and of two drafters that are compared, and what goes with them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from omegaconf import DictConfig

from aurora_rl.cli.config.schema import CanaryConfig, Config
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.remote_engines import REMOTE_ENGINES


def without_trials(merged: DictConfig, named: Collection[str]) -> None:
    """Set what an engine or ``compare`` needs or does without, unless the user named it: then it is refused."""
    if "canary.share" not in named:
        if merged.engine.name in REMOTE_ENGINES:
            merged.canary.share = 0.0
        elif merged.compare:  # even where the command's own default is 0
            merged.canary.share = CanaryConfig.share
    if merged.compare and "learner.spawn" not in named:
        merged.learner.spawn = False


def check_trials(config: Config) -> None:
    """Raise ConfigError if values of ``canary`` and ``compare`` do not go together, or not with the engine."""
    canary, compare = config.canary, f"compare={list(config.compare)}"
    for unit, size_key, size in (("rounds", "window", canary.window), ("requests", "requests", canary.requests)):
        most = getattr(canary, f"max_{unit}")
        if most is not None and most < size:
            raise ConfigError(
                f"canary.max_{unit}={most} is less than a window of canary.{size_key}={size} {unit}; set it to {size} "
                "or more, or to null"
            )
    if config.engine.remote and (canary.share or config.compare):
        trial, engine = compare if config.compare else f"canary.share={canary.share:g}", config.engine.name
        raise ConfigError(
            f"{trial}: {REMOTE_ENGINES[engine]} keeps one drafter, and cannot rebuild its cache for requests in flight,"
            " so two versions cannot take turns there; set canary.share=0 and no compare, or engine.name=transformers"
        )
    if not config.compare:
        return
    if len(config.compare) != 2:
        raise ConfigError(
            f"compare takes two drafters, such as compare=[runs/a/drafter,runs/b/drafter], got {list(config.compare)}"
        )
    if not canary.share:
        raise ConfigError(
            "compare needs a share of the rounds for the second drafter, got canary.share=0; set canary.share=0.5"
        )
    if config.learner.spawn:
        raise ConfigError("compare is of two drafters that stay what they are, got learner.spawn=true; leave it out")
    for name in ("resume", "recording"):
        if (value := getattr(config.learner, name)) is not None:
            raise ConfigError(f"learner.{name}={value} has no effect with compare, as nobody learns; leave it out")
    if config.drafter.vocab_follows:
        raise ConfigError(
            "drafter.vocab_follows=true has no effect with compare, as nobody learns; leave it out, or set it to false"
        )
    if config.drafter.name is not None or config.drafter.path is not None:
        raise ConfigError(f"{compare} names the drafters; leave drafter.name and drafter.path out")


def compared(config: Config) -> list[Config]:
    """Return a configuration of each drafter to serve: of both that are compared, or of the one that there is.

    Raises:
        ConfigError: One of ``compare`` is no folder, and cannot be an id of the hub or a drafter's name either.

    Example:
        >>> from aurora_rl.cli.config import load_config
        >>> first, second = compared(load_config(overrides=["compare=[ngram,runs/a/drafter]"]))
        >>> first.drafter.name, second.drafter.path
        ('ngram', 'runs/a/drafter')
    """
    from aurora_rl.policies.registry import get_drafter, names_drafter  # it needs torch

    if not config.compare:
        return [config]
    found = []
    for each in config.compare:
        named = names_drafter(each)
        if named:
            with naming(f"compare={list(config.compare)}: {each!r} is no folder"):
                get_drafter(each)
        drafter = replace(config.drafter, name=each if named else None, path=None if named else each)
        found.append(replace(config, drafter=drafter, compare=()))
    return found
