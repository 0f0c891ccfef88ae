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
    assert book.overtaken and book.engines["a"].foreign == 1 and book.rejected_by(1) == {}
    book.publish(2, "second", ["a"])
    assert not book.overtaken and book.due() == [(b"a", 2)]
    note(book, b"a", version=1, checksum="of another learner")  # still, while the second is on its way
    assert book.rejected_by(1) == {}
    note(book, b"a", version=2, checksum="second", received=2)
    assert not book.overtaken  # though the others are to have version 1
    note(book, b"b", version=2)
    assert book.overtaken and book.engines["b"].ahead
    book.publish(3, "third")
    assert not book.overtaken
    assert (b"a", 3) in book.due()
    note(book, b"a", version=3, checksum="something", received=3)  # what it was sent, loaded wrong
    assert not book.overtaken and list(book.rejected_by(3)) == ["a"]


def answered(acks: str, nacks: str, silent: str = "") -> EngineBook:
    """A book of engines of one letter each, some of which load version 1 and some of which reject it."""
    book = EngineBook()
    for name in acks + nacks + silent:
        note(book, name.encode())
    book.publish(1, "first")
    book.due()
    for name in nacks:
        book.note_nack(name.encode(), {"version": 1, "reason": "out of memory"})
    for name in acks:
        book.note_ack(name.encode(), {"version": 1, "checksum": "first", "swap_ms": 1.0})
    return book


def test_a_version_is_withdrawn_once_engines_reject_it_and_none_serves_it() -> None:
    book = answered(acks="abcdefg", nacks="h")
    assert not book.withdraw(1) and book.rejected_by(1) == {"h": "out of memory"} and not book.overtaken
    note(book, b"late")
    assert book.due() == [(b"late", 1)]
    assert not answered(acks="", nacks="", silent="a").withdraw(1)
    book = answered(acks="", nacks="ab")
    assert book.withdraw(1) and not book.overtaken and book.wanted == set()
    book.note_nack(b"a", {"version": 1, "reason": "again"})
    assert not book.overtaken and book.due() == []
    note(book, b"late")
    assert book.due() == [] and book.overtaken  # it is to have what is served, under a new number
    book.publish(2, "before")
    assert not book.overtaken and sorted(book.due()) == [(b"a", 2), (b"b", 2), (b"late", 2)]


def test_engines_that_have_not_answered_are_waited_for_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    book = answered(acks="", nacks="a", silent="b")
    assert not book.withdraw(1)
    now += engine_book._ANSWER_S
    assert book.withdraw(1) and book.overtaken  # should it load the version after all


def test_an_engine_that_rolls_a_version_back_serves_it_no_more() -> None:
    book = answered(acks="a", nacks="b")
    assert not book.withdraw(1)
    book.note_nack(b"a", {"version": 1, "reason": "rolled back"})
    note(book, b"a", version=1, checksum="first")  # a heartbeat that was on its way
    assert book.withdraw(1)


def test_an_engine_that_has_the_same_weights_from_a_trial_serves_them() -> None:
    book = answered(acks="", nacks="a", silent="b")
    book.publish(2, "first", ["b"])
    book.note_ack(b"b", {"version": 2, "checksum": "first", "swap_ms": 1.0})
    assert not book.withdraw(1)
    book.publish(3, "other", ["b"])  # now it tries others
    assert book.withdraw(1)


def test_an_engine_that_went_away_within_a_trial_is_to_have_what_all_have_when_it_comes_back() -> None:
    book = answered(acks="ab", nacks="")
    book.publish(2, "first", ["a"])
    book.publish(3, "second", ["b"])
    for name in ("a", "b"):
        book.forget(name.encode())
    note(book, b"c")
    book.publish(4, "second", ["c"])
    assert book.wanted == {1, 4}
    note(book, b"a", version=2, checksum="first")
    assert not book.overtaken and not book.engines["a"].ahead  # the same weights, under a later number
    note(book, b"b", version=3, checksum="second")
    assert book.overtaken and book.engines["b"].ahead


@pytest.mark.parametrize("taken", ["2", True, None, -1, 2**62])
def test_a_taken_number_that_cannot_be_one_counts_for_nothing(taken: Any) -> None:
    book = EngineBook()
    book.publish(1, "first")
    note(book, b"a")
    with pytest.raises(CodecError, match="version"):
        book.note_nack(b"a", {"version": 1, "reason": "", "taken": taken})
    assert not book.overtaken and book.next_version == 2
