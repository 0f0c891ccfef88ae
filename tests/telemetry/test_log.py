from __future__ import annotations

import json
import multiprocessing
import os
import resource
import tracemalloc
from pathlib import Path
from typing import IO

import pytest

from aurora_rl.telemetry.log import MetricsLog, MetricsReader


def test_events_carry_time_source_and_fields(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new folder" / "metrics.jsonl", "server")
    log.write("swap", version=3, ms=0.5)
    (event,) = list(MetricsReader(tmp_path / "new folder" / "metrics.jsonl"))
    assert event.pop("time") > 1.7e9
    assert event == {"source": "server", "event": "swap", "version": 3, "ms": 0.5}


def test_a_full_disk_loses_events_and_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(Path("/dev/full"), "server")  # every write to it fails as on a full disk
    log.write("one")
    log.write("two")
    assert log.lost == 2
    assert [r.message for r in caplog.records if "/dev/full cannot be written" in r.message and "No space" in r.message]
    assert len(caplog.records) == 1


def test_a_reader_follows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    assert list(reader) == []  # the file may come later
    log = MetricsLog(path, "a")
    log.write("one")
    log.write("two")
    assert [event["event"] for event in reader] == ["one", "two"]
    assert list(reader) == []
    log.write("three")
    assert [event["event"] for event in reader] == ["three"]


def test_a_file_that_cannot_be_opened_has_nothing_new(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", "server")
    log.write("one")
    reader, limit = MetricsReader(log.path), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))  # as where clients' connections took all descriptors
    try:
        assert list(reader) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert [event["event"] for event in reader] == ["one"]


def test_a_long_file_is_read_a_line_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"event": "long", "text": "x" * 1000}) + "\n"
    path.write_text(line * 5000)
    tracemalloc.start()
    try:
        assert sum(event["event"] == "long" for event in MetricsReader(path)) == 5000
        assert tracemalloc.get_traced_memory()[1] < 200_000  # of a file of 5 MB
    finally:
        tracemalloc.stop()


def test_a_reader_that_stops_early_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "one"}\n{"event": "two"}\n')
    reader = MetricsReader(path)
    assert next(iter(reader))["event"] == "one"
    assert [event["event"] for event in reader] == ["two"]


def test_a_line_being_written_waits_and_a_broken_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    path.write_text('{"event": "o')
    assert list(reader) == []
    with path.open("a") as file:
        file.write('ne"}\n{"event": \n{"event": "two"}\n')
    assert [event["event"] for event in reader] == ["one", "two"]


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


def test_a_line_that_was_cut_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, "server").write("first")
    with path.open("a") as file:
        file.write('{"event": "cut')
    MetricsLog(path, "server").write("second")
    assert [event["event"] for event in MetricsReader(path)] == ["first", "second"]


def test_a_reader_from_now_on_leaves_the_earlier_events_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(MetricsReader(path, from_now=True)) == []
    log = MetricsLog(path, "server")
    log.write("first")
    reader = MetricsReader(path, from_now=True)
    log.write("second")
    assert [event["event"] for event in reader] == ["second"]


def test_a_file_that_was_cut_is_read_from_its_new_beginning(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", "server")
    reader = MetricsReader(tmp_path / "m.jsonl")
    for number in range(3):
        log.write("swap", version=number)
    assert len(list(reader)) == 3
    os.truncate(tmp_path / "m.jsonl", 0)
    log.write("swap", version=3)
    assert [event["version"] for event in reader] == [3]


def _write_much(path: Path, name: str) -> None:
    log = MetricsLog(path, name, 1 << 16)
    for i in range(400):
        log.write("event", i=i, text="x" * 500)


def test_a_log_that_is_full_is_begun_anew_and_nothing_is_lost_to_a_reader(tmp_path: Path) -> None:
    path, older = tmp_path / "metrics.jsonl", tmp_path / "metrics.1.jsonl"
    log, reader, read = MetricsLog(path, "server", 1 << 16), MetricsReader(path), []
    for i in range(1000):
        log.write("event", i=i, text="x" * 500)
        assert path.stat().st_size <= 1 << 16 and (not older.exists() or older.stat().st_size <= 1 << 16)
        if i % 37 == 0:
            read += [event["i"] for event in reader]
    assert read + [event["i"] for event in reader] == list(range(1000))
    kept = [event["i"] for event in MetricsReader(path)]
    assert kept == list(range(1000 - len(kept), 1000)) and 110 < len(kept) < 240
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.1.jsonl", "metrics.jsonl"]


def test_a_log_begun_anew_twice_while_it_is_opened_is_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, more = tmp_path / "m.jsonl", iter(range(1, 12))
    log = MetricsLog(path, "server", 400)
    log.write("event", i=0)

    def late(name: Path, mode: str) -> IO[bytes]:
        if name != path:
            for number in more:  # of 70 bytes each, so that more than one file is full
                log.write("event", i=number)
        return open(name, mode)

    monkeypatch.setattr("aurora_rl.telemetry.log.open", late, raising=False)
    read = [event["i"] for event in MetricsReader(path)]
    assert read == list(range(read[0], 12)) and len(read) > 5


def test_two_processes_begin_a_full_log_anew_together(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_much, args=(path, name)) for name in "ab"]
    reader, read = MetricsReader(path), []
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        read += [(event["source"], event["i"]) for event in reader]
    read += [(event["source"], event["i"]) for event in reader]
    for name in "ab":
        mine = [i for source, i in read if source == name]
        assert mine == sorted(set(mine))
    # A reader that is slow may miss a whole part, with the last line of the writer that ended first; none of these two.
    kept = [(event["source"], event["i"]) for event in MetricsReader(path)]
    assert len(kept) > 110 and read[-len(kept) :] == kept and 399 in dict(kept).values()
    for writer in writers:
        writer.join()
    assert path.stat().st_size <= 1 << 16


def test_a_line_longer_than_the_limit_is_still_a_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", "server", 100)
    for number in range(3):
        log.write("long", number=number, text="x" * 500)
    assert [event["number"] for event in MetricsReader(tmp_path / "m.jsonl")] == [1, 2]
