"""`compare` from the command line: two architectures that read different layers, and what the run says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from aurora_rl.cli import main as cli
from aurora_rl.cli.history import versions
from aurora_rl.telemetry.log import MetricsReader


def test_two_architectures_are_compared_and_the_history_says_how(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = ["compare=[medusa,eagle3]", "canary.share=0.5", "canary.window=2", "canary.max_rounds=2"]
    pairs += ["drafter.depth=2", "drafter.adaptive=false", "drafter.lookup=0", "baseline.share=0"]
    assert cli.main(["flywheel", *arguments, *pairs]) == 0
    run = tmp_path / "run"
    events = list(MetricsReader(run / "metrics.jsonl"))
    (named,) = (event for event in events if event["event"] == "compare")
    (verdict,) = (event for event in events if event["event"] == "verdict")
    requests = [event for event in events if event["event"] == "request"]
    assert named["drafters"] == ["medusa", "eagle3"] and verdict["pairs"] == 1 and verdict["promote"]
    assert len(requests) == 6 and {0, 1} <= {version for event in requests for version in event["versions"]}
    assert not [event for event in events if event["event"] in ("drafter_fault", "watchdog", "learner_ready")]
    assert not (run / "learner").exists()  # nobody learns
    assert "eagle3" in (run / "drafter" / "config.json").read_text().lower()  # what drafted last
    capsys.readouterr()
    assert cli.main(["history", str(run)]) == 0
    assert "compared" in capsys.readouterr().out
    found = versions(events)
    assert [found[number].published for number in (0, 1)] == ["compared: medusa", "compared: eagle3"]
    assert found[1].outcome.startswith("promoted after 4 rounds: ") and found[1].served
