"""The options of ``aurora-rl train``, and what ``--resume`` takes from a training and refuses to change."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aurora_rl.cli.arguments import as_pair, pair_of
from aurora_rl.cli.config import Config, load_config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.frozen import plain
from aurora_rl.cli.run_dir import TRAINING
from aurora_rl.settings import check_values
from aurora_rl.storage import write_file

_TYPES = {"recording": list | None, "epochs": int, "held_out": float, "data": str | None}


def settle_options(arguments: argparse.Namespace) -> None:
    """Fill in the options that are not given: those of the training that is resumed, or the defaults."""
    defaults: dict[str, Any] = {"recording": None, "epochs": 4, "held_out": 0.1}
    arguments.recording = [str(folder.resolve()) for folder in arguments.recording or []] or None
    if arguments.recording and len(set(arguments.recording)) < len(arguments.recording):
        raise ConfigError(f"--recording {' --recording '.join(arguments.recording)}: name each recording once")
    if arguments.resume is not None:
        path = Path(arguments.resume) / TRAINING
        if not path.is_file():
            raise ConfigError(f"--resume {arguments.resume}: there is no {TRAINING} in it; it is no training's folder")
        try:
            defaults = {**defaults, "data": None, **json.loads(path.read_text(encoding="utf-8"))}
            check_values(defaults, _TYPES, TRAINING)
            for folder in defaults["recording"] or []:
                Path(folder)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} is broken: {error}; start in another folder") from error
        for name in ("recording", "held_out"):
            if getattr(arguments, name) not in (None, defaults[name]):
                option, was = f"--{name.replace('_', '-')}", defaults[name]
                started = "with " + " ".join(f"{option} {each}" for each in (was if isinstance(was, list) else [was]))
                raise ConfigError(
                    f"--resume {arguments.resume}: it was started {f'without {option}' if was is None else started}, "
                    "which stays; leave the option out, or start in another folder"
                )
    for name, value in defaults.items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    if arguments.resume is None and arguments.recording and (pair := pair_of("traffic.path", arguments.overrides)):
        raise ConfigError(
            f"{pair} next to --recording: a training learns from recordings or from chats; leave one of them out"
        )
    if arguments.epochs < 1:
        raise ConfigError(f"--epochs must be at least 1, got {arguments.epochs}")
    if not 0 < arguments.held_out < 1:
        raise ConfigError(f"--held-out must lie between 0 and 1, got {arguments.held_out}")


@contextlib.contextmanager
def saved_unless_refused(path: Path, arguments: argparse.Namespace, data: str) -> Iterator[None]:
    """Save the options that the next ``--resume`` takes; a refusal leaves those of a training that is resumed."""
    options = {name: getattr(arguments, name) for name in ("recording", "epochs", "held_out")} | {"data": data}
    before = path.read_text(encoding="utf-8") if path.exists() else None
    write_file(path, json.dumps(options, indent=2) + "\n")
    try:
        yield
    except (ValueError, OSError):
        if before is not None:
            write_file(path, before)
        raise


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings that a training depends on, by their keys. The drafter starts from the run's folder."""
    values = plain(config)
    keys = ("model", "dtype", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "generation_config", "seed")
    learner = ("batch_size", "muon_lr", "adam_lr")
    return {
        **{key: values[key] for key in (*keys, "rule", "objectives")},
        "engine.name": config.engine.name,
        **{f"{part}.{key}": value for part in ("traffic", "drafter") for key, value in values[part].items()},
        **{f"learner.{key}": values["learner"][key] for key in learner},
        "drafter.path": None,
    }


def check_resumed(config: Config, folder: Path) -> None:
    """Raise ConfigError where a training is resumed with other settings than it was started with."""
    before = _settings(load_config(folder / "config.yaml"))
    for key, value in _settings(config).items():
        if before[key] != value:
            raise ConfigError(
                f"--resume {folder}: it was started with {as_pair(key, before[key])}, and this command has "
                f"{as_pair(key, value)}; leave the key out, or start in another folder"
            )


def check_epochs(folder: Path, epochs: int, batch_size: int) -> None:
    """Raise ConfigError if more epochs have been learned than there are to be."""
    try:
        progress = json.loads((folder / "learner" / "progress.json").read_text(encoding="utf-8"))
        done = progress["batches"] / (progress["recorded"][0] // batch_size)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):  # told when the state is loaded
        return
    if done > epochs:
        least = math.ceil(done)
        raise ConfigError(f"--epochs {epochs}: more than {least - 1} epochs are learned already; give {least} or more")
