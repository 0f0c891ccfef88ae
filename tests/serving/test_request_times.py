"""Times of requests, by a clock that is set by hand."""

from __future__ import annotations

import time

import pytest

from aurora_rl.serving.request_times import RequestTimes, Wait


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def tick(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_every_wait_is_told_once_it_is_over(clock: Clock) -> None:
    told: list[tuple[Wait, float]] = []
    times = RequestTimes(lambda wait, seconds: told.append((wait, seconds)))
    clock.tick(2.0)
    times.scheduled = clock.now
    clock.tick(1.0)
    times.delivered(3)  # the first delivery, however many tokens it has, is none of the time per token
    clock.tick(0.5)
    times.delivered(4)
    clock.tick(1.5)
    times.delivered(1)
    clock.tick(0.25)
    times.completed()
    assert told == [
        ("request_queue_time", 2.0),
        ("time_to_first_token", 3.0),
        ("inter_token_latency", 0.5),
        ("inter_token_latency", 1.5),
        ("request_time_per_output_token", 2.0 / 5),
        ("e2e_request_latency", 5.25),
    ]


def test_a_request_of_one_delivery_has_no_time_per_token(clock: Clock) -> None:
    told: list[Wait] = []
    times = RequestTimes(lambda wait, seconds: told.append(wait))
    times.delivered(2)
    times.completed()
    assert told == ["request_queue_time", "time_to_first_token", "e2e_request_latency"]


@pytest.mark.parametrize(("slot", "waited"), [(False, 5.0), (True, 2.0)])
def test_a_client_that_leaves_without_a_token_has_waited_too(clock: Clock, slot: bool, waited: float) -> None:
    told: list[tuple[Wait, float]] = []
    times = RequestTimes(lambda wait, seconds: told.append((wait, seconds)))
    clock.tick(2.0)
    if slot:
        times.scheduled = clock.now
    clock.tick(3.0)
    times.abandoned(waiting=not slot)
    assert told == [("request_queue_time", waited)]
    times.delivered(1)
    del told[:]
    times.abandoned(waiting=False)
    assert told == []  # it was told with the first token


def test_tokens_may_be_known_at_the_end_alone_and_the_queue_not_at_all(clock: Clock) -> None:
    told: dict[Wait, float] = {}
    times = RequestTimes(told.__setitem__)
    times.scheduled = None
    times.delivered(0)
    clock.tick(2.0)
    times.delivered(0)
    times.completed(8)
    assert told.pop("request_time_per_output_token") == 0.25
    assert set(told) == {"time_to_first_token", "inter_token_latency", "e2e_request_latency"}
