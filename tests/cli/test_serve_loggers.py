"""`telemetry.logger`: the figures of a run are logged, and a missing package is told before anything is done."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from aurora_rl.cli import main as cli
from aurora_rl.telemetry.log import MetricsReader


def test_figures_of_a_run_are_logged(arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["flywheel", "learner.spawn=false", *arguments, "drafter.adaptive=false", "telemetry.logger=csv"]
    assert cli.main(words) == 0
    status = [event for event in MetricsReader(run / "metrics.jsonl") if event["event"] == "status"][-1]
    logged = run / "logs" / "run" / "scalars" / "status" / "acceptance_length.csv"
    step, value = logged.read_text().splitlines()[-1].split(",")
    assert (int(step), float(value)) == (6, status["acceptance_length"])


@pytest.mark.parametrize("command", ["flywheel", "serve", "learn", "train"])
def test_a_logger_whose_package_is_missing_is_told_before_a_folder_is_made(
    command: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    find = importlib.util.find_spec

    def without_mlflow(name: str, *more: Any) -> Any:
        return None if name == "mlflow" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without_mlflow)
    assert cli.main([command, *arguments, "telemetry.logger=mlflow"]) == 2
    told = "aurora-rl: telemetry.logger=mlflow needs the package mlflow: pip install mlflow\n"
    assert capsys.readouterr().err == told and not (tmp_path / "run").exists()
