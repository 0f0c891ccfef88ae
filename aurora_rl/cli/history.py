"""``aurora-rl history``: the versions of a run, why each was published, and what became of it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from aurora_rl.cli.arguments import add_no_config_arguments
from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.output import plain_console
from aurora_rl.cli.run_dir import refuse_training
from aurora_rl.cli.signals import Stop
from aurora_rl.telemetry.log import MetricsReader


@dataclass(slots=True)
class Version:
    """History of a version."""

    published: str = ""  # why it was published
    outcome: str = ""  # how its trial ended, or why it was not loaded
    served: str = ""  # requests that were complete when it began to draft every round; empty if it never did


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", type=Path, help="folder of a run")
    add_no_config_arguments(parser)


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Print the versions. Returns the exit status.

    Raises:
        ConfigError: The folder is not that of a run, or it is that of a training.
    """
    folder: Path = arguments.folder
    refuse_training(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder} has no metrics.jsonl; name the folder of a run")
    found = versions(MetricsReader(folder / "metrics.jsonl"))
    table = Table()
    for title in ("version", "published", "outcome", "from request", "kept in"):
        table.add_column(title, overflow="fold")
    kept = {number: path for number in found if (path := _kept(folder, number)) is not None}
    for number, version in sorted(found.items()):
        where = kept[number].relative_to(folder) if number in kept else ""
        table.add_row(str(number), version.published, version.outcome, version.served, str(where))
    console = plain_console()
    console.print(table)
    if kept:
        path = kept[max((number for number in kept if found[number].served), default=max(kept))]
        command = shlex.join(["aurora-rl", "serve", "--config", str(folder / "config.yaml"), f"drafter.path={path}"])
        console.print(f"a kept version is served again by drafter.path, such as\n{command}", soft_wrap=True)
    return 0


def _kept(folder: Path, version: int) -> Path | None:
    path = folder / "versions" / str(version) if version else folder / "drafter-day0"
    return path if (path / "config.json").is_file() else None


def versions(events: Iterable[dict[str, Any]]) -> dict[int, Version]:
    """Return what the events of a run say of each version.

    Example:
        >>> swap = {"event": "swap", "version": 1, "requests": 8}
        >>> versions([swap])[1].served
        '8'
    """
    found = {0: Version(published="the first drafter", served="0")}
    at_engines: Version | None = None  # version on trial at a share of the engines

    def of(number: int) -> Version:
        return found.setdefault(number, Version())

    for event in events:
        match event["event"]:
            case "gate" if event["publish"]:
                low, high = event["interval"]
                figures = f"{event['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
                of(event["version"]).published = f"gate: {figures} over {event['requests']} requests"
            case "resumed" if event.get("version") is not None:  # an earlier release does not say it
                of(event["version"]).published = "resumed: what was served before"
            case "renumbered":
                of(event["version"]).published = "published again: what was served before"
            case "compare":
                for number, drafter in enumerate(event["drafters"]):
                    of(number).published = f"compared: {drafter}"
            case "trial":
                of(event["version"]).outcome = f"on trial against version {event['against']}"
            case "verdict":
                of(event["version"]).outcome = _outcome(event, f"{event['rounds']} rounds")
            case "engine_trial":
                at_engines = of(event["version"])
                at_engines.outcome = (
                    f"on trial at {len(event['engines'])} of {event['of']} engines against version {event['against']}"
                )
            case "engine_verdict":
                at_engines = None
                of(event["version"]).outcome = _outcome(event, f"{event['requests']} requests")
                of(event["published"]).published = (
                    f"version {event['version']}, promoted"
                    if event["promote"]
                    else f"version {event['against']} again, for engines that had version {event['version']}"
                )
            case "learner_ready" if at_engines is not None:
                at_engines.outcome = "its trial ended with the learner"
            case "watchdog":
                of(event["version"]).outcome = f"{event['cause']} ({event['detail']}): {event['action']}"
            case "swap_failed":
                of(event["version"]).outcome = f"not loaded: {event['reason']}"
            case "swap":
                of(event["version"]).served = str(event["requests"])
    return found


def _outcome(event: dict[str, Any], duration: str) -> str:
    """Say how a trial ended, with the figures that there are."""
    shown = (("acceptance_length", "acceptance length", 2), ("tokens_per_second", "tokens/s", 1))
    figures = ", ".join(
        f"{name} {event[key]['old']:.{digits}f} to {event[key]['new']:.{digits}f}"
        for key, name, digits in shown
        if event[key] is not None
    )
    ended = f"{'promoted' if event['promote'] else 'rolled back'} after {duration}: {event['reason']}"
    return f"{ended}; {figures}" if figures else ended
