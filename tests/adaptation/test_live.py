"""Tokens per second in turns: who is served when, and what is counted."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from aurora_rl.adaptation import live
from aurora_rl.adaptation.live import TimedRequests, measure_in_turns, per_second_summary, serve_sample
from aurora_rl.envs import Completion, Request, SamplingParams


class Clerk:
    """A server that answers one request a step, of as many tokens as its budget."""

    def __init__(self, source: TimedRequests) -> None:
        self.source, self.served = source, 0

    def step(self) -> bool:
        if (request := self.source()) is None:
            return False
        self.served += 1
        self.source.completed(Completion(request, torch.zeros(request.sampling_params.max_tokens), terminated=False))
        return True


def requests(count: int = 3) -> list[Request]:
    return [Request(i, torch.tensor([1]), SamplingParams(max_tokens=4 + i)) for i in range(count)]


def test_a_sample_is_served_to_its_end_and_every_request_has_its_pace() -> None:
    source = TimedRequests()
    seconds, tokens = serve_sample(Clerk(source), source, requests())  # type: ignore[arg-type]
    assert tokens == 4 + 5 + 6 and 0 < sum(spent for _, spent in source.ended) <= seconds
    assert [count for count, _ in source.ended] == [4, 5, 6]


def test_arms_take_turns_and_the_first_turn_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def company(arm: str) -> Iterator[None]:
        events.append(f"{arm} begins")
        yield
        events.append(f"{arm} ends")

    servers = {}
    for arm in ("a", "b", "c"):
        source = TimedRequests()
        servers[arm] = Clerk(source), source
    asked = {arm: requests() for arm in servers}
    seconds = itertools.count(0.0)  # one between any two looks at the clock
    monkeypatch.setattr(live, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    samples = list(measure_in_turns(servers, asked, 3, company))  # type: ignore[arg-type]
    assert [(s["arm"], s["turn"]) for s in samples] == [
        (arm, turn) for turn, order in enumerate(("abc", "bca", "cab")) for arm in order
    ]
    assert events[:2] == ["c begins", "c ends"] and len(events) == 2 * 12  # a turn before those that are measured
    measured = {"tokens": 15, "seconds": 7.0, "per_second": [4.0, 5.0, 6.0]}
    assert all({**s, **measured} == s for s in samples)
    assert all(clerk.served == 12 for clerk, _ in servers.values())


def test_a_refused_request_ends_the_measurement() -> None:
    with pytest.raises(ValueError, match="too long"):
        TimedRequests().refused(requests()[0], "too long")


def test_the_percentiles_are_of_slow_and_fast_requests() -> None:
    summary = per_second_summary([float(n) for n in range(1, 102)])
    assert summary == {"mean": 51.0, "p50": 51.0, "p05": 6.0, "p95": 96.0}
