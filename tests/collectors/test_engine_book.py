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
    assert book.due() == [(b"a", 1)]
    note(book, b"b", name="engine")
    note(book, b"a", name="engine", received=1)
    assert book.due() == [(b"b", 1)]  # the first is not sent them again
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
    assert book.due() == [] and book.engines == {} and book.next_version == 1


def test_a_checksum_longer_than_any_is_not_kept() -> None:
    book = EngineBook()
    note(book, b"a", checksum="0" * 32)
    with pytest.raises(CodecError, match="the field checksum has 33 characters, and a checksum 32"):
        note(book, b"a", checksum="0" * 33)
    with pytest.raises(CodecError, match="the field checksum has 1000000 characters"):
        book.note_ack(b"a", {"version": 0, "checksum": "0" * 10**6, "swap_ms": 1.0})
    assert book.engines["a"].checksum == "0" * 32


def test_a_version_for_single_engines_stays_theirs_until_one_is_for_all() -> None:
    book = EngineBook()
    for name in ("a", "b"):
        note(book, name.encode())
    book.publish(1, "first")
    book.publish(2, "second", ["a"])
    assert sorted(book.due()) == [(b"a", 2), (b"b", 1)] and book.wanted == {1, 2}
    note(book, b"c")
    assert book.due() == [(b"c", 1)]
    book.publish(3, "third")
    for name, version in (("a", 2), ("b", 1), ("c", 1)):
        note(book, name.encode(), version=version, received=version)
    assert sorted(book.due()) == [(b"a", 3), (b"b", 3), (b"c", 3)] and book.wanted == {3}


def test_an_engine_overtakes_what_it_is_to_have_by_a_newer_version_or_other_weights_of_it() -> None:
    book = EngineBook()
    book.publish(1, "first")
    note(book, b"a", version=1, checksum="of another learner")
    assert book.overtaken and book.engines["a"].foreign == 1 and book.rejection(1) is None
    book.publish(2, "second", ["a"])
    assert not book.overtaken and book.due() == [(b"a", 2)]
    note(book, b"a", version=2, checksum="second", received=2)
    assert not book.overtaken  # though the others are to have version 1
    note(book, b"b", version=2)
    assert book.overtaken and book.engines["b"].ahead
    book.publish(3, "third")
    assert not book.overtaken
    assert (b"a", 3) in book.due()
    note(book, b"a", version=3, checksum="something", received=3)  # what it was sent, loaded wrong
    assert not book.overtaken and book.rejection(3) is not None
