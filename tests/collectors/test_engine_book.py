"""What a learner knows of its engines: bounded, and each connection's own."""

from __future__ import annotations

from typing import Any

import pytest

from aurora_rl.collectors import engine_book
from aurora_rl.collectors.codec import CodecError
from aurora_rl.collectors.engine_book import EngineBook


def note(book: EngineBook, connection: bytes, **fields: Any) -> None:
    name = fields.pop("name", connection.decode())
    book.note_serving(connection, name, {"version": 0, "checksum": None, "received": None} | fields)


def test_the_least_recently_heard_is_forgotten() -> None:
    book = EngineBook()
    for number in [*range(200), 0, *range(200, 300)]:  # the first one lives and is heard again
        note(book, f"{number}".encode())
    assert len(book.engines) == 256 and "0" in book.engines and "1" not in book.engines


def test_another_connection_under_the_same_name_takes_nothing_away() -> None:
    book = EngineBook()
    book.publish(1, "sum")
    note(book, b"a", name="engine")
    assert book.due(1) == [b"a"]
    note(book, b"b", name="engine")
    note(book, b"a", name="engine", received=1)
    assert book.due(1) == [b"b"]  # the first is not sent them again
    for connection in (b"a", b"b"):
        book.note_ack(connection, {"version": 1, "checksum": "sum", "swap_ms": 1.0})
    assert book.wait_ack(1, 0.0, 1) and not book.wait_ack(1, 0.0, 2)  # of one name


def test_a_version_may_lead_by_what_an_earlier_learner_published() -> None:
    book = EngineBook()
    note(book, b"a", version=2**32)
    assert book.next_version == 2**32 + 1
    book.publish(book.next_version, "sum")
    with pytest.raises(CodecError, match="says that it serves version 8589934594, and 4294967297 is published"):
        note(book, b"a", version=2**33 + 2)
    assert book.next_version == 2**32 + 2


def test_what_nobody_introduced_is_not_noted() -> None:
    book = EngineBook()
    book.publish(1, "sum")
    book.note_ack(b"a", {"version": 1, "checksum": "sum", "swap_ms": 1.0})
    book.note_nack(b"a", {"version": 1, "reason": "no"})
    assert book.engines == {} and not book.wait_ack(1, 0.0, 1)


def test_silence_ends_what_was_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    book = EngineBook()
    note(book, b"a", version=5)
    now += engine_book._FORGET_S + 1
    assert book.due(1) == [] and book.engines == {} and book.next_version == 1


def test_a_checksum_longer_than_any_is_not_kept() -> None:
    book = EngineBook()
    note(book, b"a", checksum="0" * 32)
    with pytest.raises(CodecError, match="the field checksum has 33 characters, and a checksum 32"):
        note(book, b"a", checksum="0" * 33)
    with pytest.raises(CodecError, match="the field checksum has 1000000 characters"):
        book.note_ack(b"a", {"version": 0, "checksum": "0" * 10**6, "swap_ms": 1.0})
    assert book.engines["a"].checksum == "0" * 32
