"""Statistics of a run and their summary, against sums by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from aurora_rl.telemetry.rates import Round
from aurora_rl.telemetry.stats import Finished, Stats


def test_a_summary_of_twenty_requests() -> None:
    stats = Stats(version=3)
    for number in range(20):
        # Acceptance length rises from 1 to 20; each request has 32 plain rounds, of two seconds in all, and one other.
        stats.finish("code" if number % 2 else "chat", number + 2, number + 1, 1)
    stats.rounds = [
        Round(speculative, 1, tokens, seconds, number, count)
        for number in range(20)
        for speculative, tokens, seconds, count in ((False, 1, 2.0, 32), (True, number + 1, 1.0, 1))
    ]
    stats.swap_ms, stats.drafter_faults = [5.0, 1.0, 3.0, 9.0], 2
    stats.versions.append(4)
    assert stats.version == 4
    assert stats.summary(client_requests=2, failed=1, drops=Counter(no_learner=5, malformed=2), duration_s=60.5) == {
        "requests": 20,
        "client_requests": 2,
        "failed": 1,
        "swaps": 4,
        "swap_ms": {"p50": 4.0, "max": 9.0},
        "acceptance_length": {"first": 4.5, "last": 16.5},  # a tenth is two requests
        "domains": {
            "chat": {"requests": 10, "tokens": 110, "acceptance_length": 10.0},
            "code": {"requests": 10, "tokens": 120, "acceptance_length": 11.0},
        },
        "tokens_per_second": {"baseline": 0.5, "speculative": 18.0},  # of the last five: 16 to 20 tokens a second
        "speedup": 36.0,
        "baseline_rounds": 160,
        "dropped_trajectories": 7,
        "dropped_by_reason": {"no_learner": 5, "malformed": 2},
        "drafter_faults": 2,
        "duration_s": 60.5,
        "versions_served": [3, 4],
    }


def test_acceptance_is_of_tokens_over_rounds_and_not_of_ratios() -> None:
    stats = Stats()
    for tokens, rounds in ((10, 2), (1, 1), (0, 0)):
        stats.finish("", tokens, tokens, rounds)
    assert stats.acceptance(0, 3) == 11 / 3
    assert stats.acceptance(2, 3) is None and stats.acceptance(3, 3) is None
    assert stats.summary()["domains"] == {}  # no prompt has a domain
    stats.finish("chat", 4, 0, 0)
    assert stats.summary()["domains"] == {
        "": {"requests": 3, "tokens": 11, "acceptance_length": 11 / 3},
        "chat": {"requests": 1, "tokens": 4, "acceptance_length": None},
    }


@pytest.mark.parametrize(("count", "tenth"), [(1, 1), (3, 2), (10, 5), (16, 8), (80, 8), (200, 20)])
def test_a_tenth_of_few_requests_is_eight_of_them_or_half(count: int, tenth: int) -> None:
    stats = Stats()
    for number in range(count):
        stats.finish("", 1 + (number >= count - tenth), 1 + (number >= count - tenth), 1)
    assert stats.last_acceptance == 2.0 == stats.summary()["acceptance_length"]["last"]
    assert stats.summary()["acceptance_length"]["first"] == (1.0 if 2 * tenth <= count else pytest.approx(2.0, abs=0.5))


def test_what_was_not_measured_is_none() -> None:
    summary = Stats().summary()
    assert summary["swap_ms"] == {"p50": None, "max": None}
    assert summary["acceptance_length"] == {"first": None, "last": None}
    assert summary["tokens_per_second"] == {"baseline": None, "speculative": None} and summary["speedup"] is None
    assert summary["versions_served"] == [] and summary["requests"] == 0


def test_requests_of_which_only_sums_are_known_share_them() -> None:
    stats = Stats()
    stats.finish("", 30, 20, 7, requests=3)
    assert len(stats.finished) == 3 and stats.acceptance(0, 3) == 20 / 7
    assert max(stats.finished) == (7, 3) and min(stats.finished) == (6, 2)
    assert stats.domains[""] == {"requests": 3, "tokens": 30, "speculative": 20, "rounds": 7}


def test_memory_does_not_grow_with_the_requests() -> None:
    finished, kept = Finished(buckets=64), []
    for number in range(5000):
        kept.append((number % 7, 1 + number % 3))
        finished.append(*kept[-1])
        assert len(finished) == len(kept) and 32 <= len(list(finished)) <= 64 or number < 32
    assert [sum(column) for column in zip(*finished, strict=True)] == [
        sum(column) for column in zip(*kept, strict=True)
    ]
    width = 128  # of requests in a sum: 5000 / 64, up to the next power of two
    tokens, rounds = (sum(column) for column in zip(*kept[width : 3 * width], strict=True))
    assert finished.acceptance(width, 3 * width) == finished.acceptance(width + 5, 2 * width + 1) == tokens / rounds
    assert finished.acceptance(0, 0) is None
