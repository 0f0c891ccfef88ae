"""Measures of learning speed, against values worked out by hand and slow definitions."""

from __future__ import annotations

import random

import pytest

from aurora_rl.adaptation.metrics import (
    REGAINED,
    StreamCounts,
    block_bootstrap,
    forgotten,
    level,
    regret,
    requests_to,
    trailing_acceptance,
)


def some(count: int, seed: int = 0) -> StreamCounts:
    draw = random.Random(seed)
    rounds = [draw.randint(1, 20) for _ in range(count)]
    return StreamCounts([each + draw.randint(0, 2 * each) for each in rounds], rounds)


@pytest.mark.parametrize(
    ("tokens", "rounds", "told"),
    [([1], [1, 1], "1 requests have tokens, and 2 have rounds"), ([2, 3], [1, 4], "request 1 has 3 tokens in 4 rounds"),
     ([0], [0], "request 0 has 0 tokens in 0 rounds")],
)  # fmt: skip
def test_impossible_requests_are_refused(tokens: list[int], rounds: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        StreamCounts(tokens, rounds)


def test_a_trailing_window_is_that_of_its_requests() -> None:
    served, window = some(30), 7
    slow = [served.part(end - window, end).acceptance_length() for end in range(window, 31)]
    assert trailing_acceptance(served, window) == pytest.approx(slow)
    assert trailing_acceptance(served.part(0, 6), window) == []


def test_a_level_is_reached_once_and_counts_the_requests_of_the_window() -> None:
    served = StreamCounts([2, 2, 4, 4, 1], [2, 2, 2, 2, 1])  # 1, 1, 2, 2, 1
    assert [requests_to(served, wanted, 2) for wanted in (1.0, 1.5, 2.0, 2.1)] == [2, 3, 4, None]


def test_regaining_is_95_percent_of_what_was_there() -> None:
    phase = StreamCounts([100, 100, 100], [100, 53, 52])
    assert requests_to(phase, REGAINED * 2.0, 1) == 3  # 1.887 is not 1.9, 1.923 is
    assert requests_to(phase, REGAINED * 2.5, 1) is None


def test_a_level_is_that_of_the_last_third_and_what_is_forgotten_is_measured_from_it() -> None:
    first = StreamCounts([1, 1, 1, 1, 6, 6], [1, 1, 1, 1, 2, 3])
    assert level(first) == 12 / 5
    assert forgotten(first, StreamCounts([6, 6], [5, 5])) == pytest.approx(1 - 1.2 / 2.4)
    assert forgotten(first, first) > 0  # the young first phase itself is below its level


def test_regret_is_of_the_arm_with_the_fewest_rounds_over_the_whole_stream() -> None:
    tokens = [10, 10]
    fixed = {"a": StreamCounts(tokens, [2, 9]), "b": StreamCounts(tokens, [5, 5])}
    assert regret(StreamCounts(tokens, [2, 5]), fixed) == ("b", pytest.approx(-0.3))


def test_the_interval_has_the_ratio_in_it_about_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(40):
        draw = random.Random(seed)
        rounds = [[draw.randint(5, 15) for _ in range(64)] for _ in range(2)]
        interval = block_bootstrap(StreamCounts([15] * 64, rounds[0]), StreamCounts([15] * 64, rounds[1]), samples=300)
        assert interval is not None
        low, high = interval
        inside += low <= 1.0 <= high
    assert inside >= 33


def test_the_interval_is_that_of_whole_blocks() -> None:
    arm, reference = some(32, 1), some(32, 2)
    interval = block_bootstrap(arm, reference)
    assert interval is not None
    ratio = arm.acceptance_length() / reference.acceptance_length()
    assert interval[0] < ratio < interval[1]
    assert block_bootstrap(arm.part(0, 31), reference.part(0, 31)) is None
