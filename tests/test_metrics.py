from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from aurora_rl.metrics import MetricsLog, MetricsReader


def test_events_carry_time_source_and_fields(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new folder" / "metrics.jsonl", "server")
    log.write("swap", version=3, ms=0.5)
    log.close()
    (event,) = MetricsReader(tmp_path / "new folder" / "metrics.jsonl").new()
    assert event.pop("time") > 1.7e9
    assert event == {"source": "server", "event": "swap", "version": 3, "ms": 0.5}


def test_a_full_disk_loses_events_and_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(Path("/dev/full"), "server")  # every write to it fails as on a full disk
    log.write("one")
    log.write("two")
    assert log.lost == 2
    assert [r.message for r in caplog.records if "metrics cannot be written" in r.message and "No space" in r.message]
    assert len(caplog.records) == 1


def test_a_reader_follows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    assert reader.new() == []  # the file may come later
    log = MetricsLog(path, "a")
    log.write("one")
    log.write("two")
    assert [event["event"] for event in reader.new()] == ["one", "two"]
    assert reader.new() == []
    late = MetricsReader(path, at_end=True)
    log.write("three")
    assert [event["event"] for event in reader.new()] == [event["event"] for event in late.new()] == ["three"]
    assert MetricsReader(tmp_path / "nowhere", at_end=True).new() == []


def test_a_line_being_written_waits_and_a_broken_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    path.write_text('{"event": "o')
    assert reader.new() == []
    with path.open("a") as file:
        file.write('ne"}\n{"event": \n{"event": "two"}\n')
    assert [event["event"] for event in reader.new()] == ["one", "two"]


def _write(path: Path, name: str) -> None:
    log = MetricsLog(path, name)
    for i in range(500):
        log.write("event", i=i, text="x" * 500)


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [e["i"] for e in events if e["source"] == "a"] == [e["i"] for e in events if e["source"] == "b"]
    assert len(events) == 1000
