"""Arguments that every command takes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from aurora_rl.cli.frozen import plain

SAVED_LAST = (
    "the learner and drafter saved last; lines are appended, and files that are written anew move to RUN_DIR/part-1"
)
"""What ``--resume`` goes on with in the folder of a server or a learner."""


def add_resume_argument(parser: argparse.ArgumentParser, effect: str) -> None:
    """Add ``--resume``; ``effect`` says what the command goes on with, and what becomes of the files of the run."""
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help=f"go on in the folder of an earlier run, with its configuration and {effect}",
    )


def add_end_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--end-with PID``, for commands that a fleet starts: they end when that process does."""
    parser.add_argument("--end-with", metavar="PID", type=int, help=argparse.SUPPRESS)


def add_config_arguments(parser: argparse.ArgumentParser, example: str = "engine.slots=1") -> None:
    """Add ``--config``, ``--print-config`` and the ``key=value`` pairs, such as ``example``, as the last arguments."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys")
    parser.add_argument("--print-config", action="store_true", help="print the resulting configuration and end")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=f"for example {example}")


def add_no_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Have a command take no configuration, for those that no key changes."""
    parser.set_defaults(config=None, overrides=None, print_config=False)


def pair_of(key: str, overrides: Sequence[str]) -> str | None:
    """Return the ``key=value`` pair of a command line that sets a key, the last of several; None if none does.

    Example:
        >>> pair_of("engine.slots", ["seed=1", "engine.slots=2"])
        'engine.slots=2'
    """
    return next((pair for pair in reversed(overrides) if pair.partition("=")[0] == key), None)


def as_pair(key: str, value: Any) -> str:
    """Return a setting as ``key=value``, its value as a command line takes it.

    Example:
        >>> as_pair("drafter.path", None), as_pair("learner.betas", (0.9, 0.95)), as_pair("model", "smollm2")
        ('drafter.path=null', 'learner.betas=[0.9, 0.95]', 'model=smollm2')
    """
    return f"{key}={value if isinstance(value, str) else json.dumps(plain(value))}"
