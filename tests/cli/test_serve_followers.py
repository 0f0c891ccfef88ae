"""Who follows a run gets its events from the start on."""

from __future__ import annotations

from typing import Any

import pytest

from aurora_rl.cli import main as cli
from aurora_rl.cli import serve
from aurora_rl.telemetry.log import MetricsReader
from aurora_rl.telemetry.view import LiveView


class ReadyLearner:
    """A learner that is ready once it has read the log to its end."""

    state = "running"

    def __init__(self, *arguments: Any) -> None:
        pass

    def wait_ready(self, events: MetricsReader) -> None:
        assert list(events)

    def tend(self) -> bool:
        return False

    def end(self) -> None:
        pass


def test_what_was_logged_while_the_learner_started_is_followed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def view(*args: Any, **options: Any) -> LiveView:
        return LiveView(*args, **options | {"followers": [lambda event: seen.append(event["event"])]})

    monkeypatch.setattr(serve, "LiveView", view)
    monkeypatch.setattr(serve, "LearnerProcess", ReadyLearner)
    assert cli.main(["flywheel", *arguments, "traffic.requests=2"]) == 0
    assert [event for event in seen if event in ("costs", "request")] == ["costs", "request", "request"]
