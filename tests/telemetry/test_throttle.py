from __future__ import annotations

import logging

import pytest

from aurora_rl.telemetry.throttle import Throttle


def test_each_kind_is_logged_once_in_a_while_and_says_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    throttle = Throttle(logging.getLogger("wire"), seconds=60)
    for number in range(5):
        throttle.warning("malformed", "message %d", number)
    throttle.warning("refused", "peer")
    now += 61
    throttle.warning("malformed", "message %d", 5)
    throttle.warning("malformed", "message %d", 6)
    assert caplog.messages == ["message 0", "peer", "message 5 (4 like it were not logged)"]
