"""`aurora-rl report`: written again from a run's events, or from the results of a bench."""

from __future__ import annotations

from pathlib import Path

import pytest

from aurora_rl.adaptation.scenario import read_scenario, to_yaml
from aurora_rl.cli import report
from aurora_rl.cli.main import main
from aurora_rl.telemetry.history import RunHistory
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.report import draw_report


def test_the_last_part_of_a_run_is_drawn_from_its_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", "server")
    log.write("swap", version=1, ms=2.5, requests=8)
    log.write("begin", traffic=8, unseen=6)
    log.write("swap", version=2, ms=1.5, requests=4)
    drawn: list[RunHistory] = []
    monkeypatch.setattr(
        report, "draw_report", lambda path, history: (drawn.append(history), draw_report(path, history))
    )
    assert main(["report", str(tmp_path)]) == 0
    (history,) = drawn
    assert [swap.version for swap in history.swaps] == [2] and history.marks == [(6, "unseen templates")]
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert "report.png" in capsys.readouterr().out


@pytest.mark.parametrize("scenario", [False, True])
def test_a_folder_with_nothing_to_tell_is_named(
    scenario: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if scenario:
        (tmp_path / "scenario.yaml").write_text(to_yaml(read_scenario("smoke")))
    assert main(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert str(tmp_path) in told and ("no arm of the scenario has a result" if scenario else "has neither") in told


def test_events_of_another_release_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MetricsLog(tmp_path / "metrics.jsonl", "server").write("gate", version=1)
    assert main(["report", str(tmp_path)]) == 2
    assert "metrics.jsonl: event 'gate' has no " in capsys.readouterr().err


def test_the_folder_of_a_training_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MetricsLog(tmp_path / "metrics.jsonl", "train").write("train", loss=2.0, batches=1)
    (tmp_path / "train.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"aurora-rl: {tmp_path} is the folder of a training, which serves nothing")
    assert str(tmp_path / "summary.json") in line and not (tmp_path / "report.png").exists()
