"""``aurora-rl report``: write the report of a folder again from its files."""

from __future__ import annotations

import argparse
from pathlib import Path

from aurora_rl.adaptation import report
from aurora_rl.adaptation.scenario import read_scenario
from aurora_rl.cli.arguments import add_no_config_arguments
from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.cli.run_dir import refuse_training
from aurora_rl.cli.signals import Stop
from aurora_rl.telemetry.history import RunHistory
from aurora_rl.telemetry.log import MetricsReader
from aurora_rl.telemetry.report import draw_report


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", type=Path, help="folder of a run, or of aurora-rl bench adaptation")
    add_no_config_arguments(parser)


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Write the report. Returns the exit status.

    Raises:
        ConfigError: The folder is neither of the two (as that of a training), or holds no result yet.
    """
    folder = arguments.folder
    refuse_training(folder)
    if (folder / "scenario.yaml").is_file():
        with naming(str(folder)):
            report.write(folder, report.collect(folder, read_scenario(folder / "scenario.yaml")))
        print(f"written to {folder}: results.json, report.md, *.png")
    elif (folder / "metrics.jsonl").is_file():
        history = RunHistory()
        for event in MetricsReader(folder / "metrics.jsonl"):
            if event["event"] == "begin":  # the last part of a resumed run is drawn, as at its end
                history = RunHistory()
            try:
                history.follow(event)
            except KeyError as error:
                raise ConfigError(
                    f"{folder}/metrics.jsonl: event {event['event']!r} has no {error}; another release wrote it"
                ) from error
        draw_report(folder / "report.png", history)
        print(f"written to {folder}: report.png")
    else:
        raise ConfigError(
            f"{folder} has neither scenario.yaml nor metrics.jsonl; name the folder of a run or of a bench"
        )
    return 0
