"""Outputs that cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from aurora_rl.telemetry.log import JsonLines, MetricsLog, MetricsReader
from aurora_rl.telemetry.outputs import Outputs, one_line


def full() -> None:
    raise OSError("the disk\n is full")


def test_each_failure_is_logged_the_first_is_warned_of_and_all_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outputs = Outputs(MetricsLog(tmp_path / "metrics.jsonl", "learner"))
    written: list[int] = []
    assert outputs.write("b", lambda: written.append(1)) and written == [1] and not outputs.failures
    assert not outputs.write("a", full) and not outputs.write("a", full)
    assert outputs.failures == {"a": "a could not be written (2 times): the disk is full"}
    assert [r.message for r in caplog.records] == ["a was not written, and the run goes on: the disk is full"]
    events = list(MetricsReader(tmp_path / "metrics.jsonl"))
    assert [(event["event"], event["what"], event["reason"]) for event in events] == [
        ("not_written", "a", "the disk is full")
    ] * 2


def test_lines_that_a_file_lost_are_told(tmp_path: Path) -> None:
    outputs, lines = Outputs(), JsonLines(tmp_path / "answers.jsonl")
    outputs.count(lines)
    assert not outputs.failures
    lines.lost = 3
    outputs.count(lines)
    assert list(outputs.failures.values()) == [f"{lines.path} lacks 3 lines that could not be written"]


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(OSError(28, "No space left on device")) == "No space left on device"
    assert one_line(OSError(2, "No such file or directory", "/x")) == "[Errno 2] No such file or directory: '/x'"
