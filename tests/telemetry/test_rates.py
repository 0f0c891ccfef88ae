"""Tokens per second of both kinds, and when the plain windows come."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from aurora_rl.telemetry.rates import MIN_BASELINE_ROUNDS, BaselineWindows, Rates, Round, Rounds, rates

SPECULATIVE, PLAIN = True, False


# ---- rates ------------------------------------------------------------------------------------------------------


def test_rates_at_equal_occupancy() -> None:
    rounds = [
        Round(SPECULATIVE, 1, 3, 1.5, 0), Round(SPECULATIVE, 1, 1, 0.5, 0),  # 4 tokens in 2 s: 2 a second
        Round(PLAIN, 1, 60, 60.0, 0, 60),  # 1 a second
        Round(SPECULATIVE, 2, 9, 1.0, 0),  # 9 a second
        Round(PLAIN, 2, 108, 36.0, 0, 36),  # 3 a second
    ]  # fmt: skip
    # Weights are the speculative seconds, 2 and 1: (2 * 2 + 1 * 9) / 3 and (2 * 1 + 1 * 3) / 3.
    measured = rates(rounds)
    assert measured.speculative == pytest.approx(13 / 3) and measured.baseline == pytest.approx(5 / 3)
    assert measured.speedup == pytest.approx(2.6) and not measured.too_short


def test_a_fuller_batch_flatters_nobody() -> None:
    # Plain windows met full batches only, speculation half of them: tokens over time would say 26 / 6 against 4.
    rounds = [Round(SPECULATIVE, 1, 10, 5.0, 0), Round(SPECULATIVE, 4, 16, 1.0, 0), Round(PLAIN, 4, 8, 2.0, 0)]
    assert rates(rounds) == Rates(baseline=4.0, speculative=16.0, baseline_rounds=1)


def test_a_speedup_is_told_from_three_windows_on() -> None:
    short = [Round(SPECULATIVE, 1, 4, 1.0, 0), *(Round(PLAIN, 1, 1, 0.5, 0) for _ in range(MIN_BASELINE_ROUNDS - 1))]
    assert rates(short).too_short and rates(short).speedup is None
    enough = [*short, Round(PLAIN, 1, 1, 0.5, 0)]
    assert not rates(enough).too_short and rates(enough).speedup == pytest.approx(2.0)
    sums = Rounds()
    for each in enough:
        sums.append(each)
    assert rates(sums) == rates(enough)
    # Of other numbers of slots no rate is made, however many rounds there were.
    elsewhere = [Round(SPECULATIVE, 1, 4, 1.0, 0), Round(PLAIN, 1, 1, 0.5, 0), Round(PLAIN, 8, 800, 100.0, 0, 100)]
    assert rates(elsewhere).too_short and rates(elsewhere).baseline_rounds == 1
    # Nothing was measured plainly: that is not too short, it is not measured.
    assert not rates(short[:1]).too_short and rates(short[:1]).speedup is None


def test_time_without_tokens_is_charged() -> None:
    rounds = [Round(SPECULATIVE, 1, 4, 2.0, 0), Round(PLAIN, 1, 1, 1.0, 0)]
    assert rates([*rounds, Round(SPECULATIVE, 1, 0, 2.0, 0)]) == Rates(1.0, 1.0, baseline_rounds=1)


@pytest.mark.parametrize("extra", [40, 80, 120])
def test_rounds_that_draft_are_faster_than_plain_ones_above_the_break_even(extra: int) -> None:
    # 185 of 300 slots were drafted for, in rounds that took as long as 260 + 120 tokens of plain decoding.
    plain = [Round(PLAIN, 1, 96, 96.0, 0, 96), Round(PLAIN, 2, 80, 20.0, 0, 40)]
    alone, full = Round(SPECULATIVE, 1, 200 + extra, 260.0, 0, 200, 160), Round(SPECULATIVE, 2, 100, 30.0, 0, 50, 25)
    drafting, sums = rates([*plain, alone, full]), Rounds()
    assert drafting.break_even == pytest.approx(1 + 80 / 185)
    assert drafting.speedup == pytest.approx((300 + extra) / 380)
    acceptance_length = 1 + extra / 185
    assert (drafting.speedup > 1.001) == (acceptance_length > drafting.break_even + 0.001)
    # What other rounds cost is another matter: here some that drafted nothing, and slots without a plain round.
    for each in (*plain, alone, Round(SPECULATIVE, 1, 50, 90.0, 0, 50), full, Round(SPECULATIVE, 3, 9, 1.0, 0, 1, 3)):
        sums.append(each)
    assert rates(sums).break_even == pytest.approx(drafting.break_even) and rates(sums).speedup < drafting.speedup


def test_without_drafts_or_enough_plain_rounds_there_is_no_break_even() -> None:
    plain = Round(PLAIN, 1, MIN_BASELINE_ROUNDS, 10.0, 0, MIN_BASELINE_ROUNDS)
    assert rates([plain, Round(SPECULATIVE, 1, 4, 4.0, 0, 4)]).break_even is None
    assert rates([replace(plain, count=95), Round(SPECULATIVE, 1, 4, 4.0, 0, 4, 4)]).break_even is None


def test_what_was_not_measured_is_none() -> None:
    speculative, plain, recording = Round(True, 1, 4, 2.0, 0), Round(False, 2, 3, 1.0, 0), Round(True, 2, 0, 0.5, 0)
    assert rates([]) == Rates(None, None) and rates([]).speedup is None
    assert rates([speculative]) == Rates(None, 2.0) and rates([speculative]).speedup is None
    assert rates([plain]) == Rates(3.0, None, 1) and rates([plain]).speedup is None
    # The time to record what plain rounds decoded is no measurement of speculation.
    assert rates([plain, recording]) == Rates(3.0, None, 1)
    # No occupancy in common: each kind as it was met.
    assert rates([speculative, plain]) == Rates(3.0, 2.0, 1)


def some_rounds(requests: int, each: int) -> list[Round]:
    dice = random.Random(0)
    return [
        Round(dice.random() < 0.8, dice.randint(1, 3), dice.randint(1, 9), dice.random(), request)
        for request in range(requests)
        for _ in range(each)
    ]


def the_same(left: Rates, right: Rates, rel: float) -> bool:
    return (left.baseline, left.speculative) == pytest.approx((right.baseline, right.speculative), rel=rel)


def test_sums_of_rounds_tell_what_the_rounds_told() -> None:
    every, sums = some_rounds(100, 20), Rounds()
    for each in every:
        sums.append(each)
    assert len(list(sums)) <= 100 * 2 * 3 < len(every)
    for first in (0, 1, 25, 75, 99):
        naive = rates([r for r in every if r.request >= first])
        assert the_same(rates([r for r in sums if r.request >= first]), naive, 1e-9)


def test_memory_is_bounded_in_rounds_and_in_requests() -> None:
    sums = Rounds(buckets=64)
    for request in range(64):
        sums.append(Round(True, 1, request, 0.5, request))
    assert [r.request for r in sums] == list(range(64))  # each by itself still
    sums.append(Round(True, 1, 1, 0.5, 64))
    assert [(r.request, r.tokens, r.seconds) for r in sums][:2] == [(0, 1, 1.0), (2, 5, 1.0)]
    assert len(list(sums)) == 33
    sums.append(Round(True, 1, 1, 0.5, 1000))  # several doublings at once: 16 requests in a bucket
    assert [r.request for r in sums] == [0, 16, 32, 48, 64, 992]
    assert sum(r.tokens for r in sums) == sum(range(64)) + 2 and sum(r.seconds for r in sums) == 33.0


def test_of_a_long_run_the_last_quarter_is_what_it_was() -> None:
    every, sums = some_rounds(5000, 4), Rounds()
    for each in every:
        sums.append(each)
    assert len(list(sums)) <= 1024 * 2 * 3
    naive = rates([r for r in every if r.request >= 3750])
    # Eight requests in a bucket; the quarter begins up to seven later.
    assert the_same(rates([r for r in sums if r.request >= 3750]), naive, 5e-3)
    assert the_same(rates(sums), rates(every), 1e-9)


# ---- windows ----------------------------------------------------------------------------------------------------


def simulate(windows: BaselineWindows, rounds: int, speculative: float, plain: float) -> list[bool]:
    """Which of so many rounds speculate, where a round of each kind takes so many seconds."""
    kinds = []
    for _ in range(rounds):
        kinds.append(windows.speculate)
        windows.spent(speculative if kinds[-1] else plain)
    return kinds


def runs(kinds: list[bool]) -> list[tuple[bool, int]]:
    return [(kind, len(list(run))) for kind, run in itertools.groupby(kinds)]


@pytest.mark.parametrize("share", [0.1, 0.25])
@pytest.mark.parametrize("speculative", [0.02, 0.1, 0.3], ids=["fast", "equal", "slow"])
def test_windows_take_their_share_of_time(share: float, speculative: float) -> None:
    plain, count = 0.1, 100_000
    windows = BaselineWindows(share, window=32, seed=3)
    kinds = simulate(windows, count, speculative, plain)
    plain_seconds = plain * kinds.count(PLAIN)
    taken = plain_seconds / (plain_seconds + speculative * kinds.count(SPECULATIVE))
    # Over 500 windows or more the mean of waits drawn from 0.5 .. 1.5 has an error of 1.3%; 3 of these, and the end.
    assert taken == pytest.approx(share, rel=0.06)


def test_windows_follow_a_change_of_speed() -> None:
    windows = BaselineWindows(0.1, window=8, seed=0)
    simulate(windows, 20_000, speculative=0.5, plain=0.1)
    kinds = simulate(windows, 60_000, speculative=0.05, plain=0.1)  # the drafter got better
    plain = 0.1 * kinds.count(PLAIN)
    assert plain / (plain + 0.05 * kinds.count(SPECULATIVE)) == pytest.approx(0.1, rel=0.08)


def test_windows_are_whole_and_placed_at_random() -> None:
    kinds = simulate(BaselineWindows(0.1, window=32, seed=1), 20_000, speculative=0.05, plain=0.05)
    lengths = runs(kinds)[:-1]  # the last is cut by the end
    assert {length for kind, length in lengths if kind is PLAIN} == {32}
    waits = [length for kind, length in lengths[1:] if kind is SPECULATIVE]
    # 32 rounds are a tenth of 320: 288 between windows on average, from half to one and a half of that.
    assert 140 <= min(waits) < 200 and 370 < max(waits) <= 433 and len(set(waits)) > 20
    # The first comes within two seconds of decoding, so that a short run has one.
    assert lengths[0][0] is SPECULATIVE and lengths[0][1] * 0.05 <= 2.05


def test_the_seed_places_the_windows() -> None:
    first, again, another_seed = (simulate(BaselineWindows(0.2, 4, seed), 2_000, 0.1, 0.1) for seed in (5, 5, 6))
    assert first == again and first != another_seed


def test_a_share_of_zero_has_no_windows() -> None:
    assert all(simulate(BaselineWindows(0.0, window=32), 5_000, 0.1, 0.1))
