"""The paired test holds its false-alarm rate at every look, on streams that break the assumptions of usual tests."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from statistics import fmean, stdev

import pytest

from aurora_rl.statistics import FigurePair, LossTest, PairedTest, mean_interval

RATE, STREAMS, PAIRS = 0.05, 400, 48
# Three standard errors above the rate: a test that keeps it fails here once in a thousand.
BOUND = RATE + 3 * math.sqrt(RATE * (1 - RATE) / STREAMS)


def windows(kind: str, dice: random.Random) -> Iterator[float]:
    """Acceptance lengths of neighbouring windows of one drafter."""
    level = 0.0
    for index in range(10**9):
        match kind:
            case "independent":
                yield 2 + dice.gauss(0, 0.3)
            case "correlated":
                level = 0.95 * level + dice.gauss(0, 0.1)
                yield 2 + level + dice.gauss(0, 0.05)
            case "drifting":
                yield 2 + 0.05 * index + dice.gauss(0, 0.1)
            case "heavy":  # a machine that holds windows up for arbitrarily long
                yield 2 + 0.1 * math.tan(math.pi * (dice.random() - 0.5))


def differences(kind: str, dice: random.Random, *, randomised: bool = True) -> Iterator[float]:
    """New minus old of pairs of windows, of the same drafter."""
    source = windows(kind, dice)
    while True:
        first, second = next(source), next(source)
        yield second - first if not randomised or dice.random() < 0.5 else first - second


def rejected_by_the_paired_test(stream: Iterator[float]) -> bool:
    test = PairedTest(RATE)
    for _ in range(PAIRS):
        test.add(next(stream))
    return test.rejected


def rejected_by_a_z_test(stream: Iterator[float]) -> bool:
    """What is often done: look after every pair whether the mean is significant now."""
    seen: list[float] = []
    for _ in range(PAIRS):
        seen.append(next(stream))
        if len(seen) > 4 and fmean(seen) > 1.645 * stdev(seen) / math.sqrt(len(seen)):
            return True
    return False


def false_alarms(kind: str, rejected: Callable[[Iterator[float]], bool], *, randomised: bool = True) -> float:
    dice = random.Random(1)
    return fmean(rejected(differences(kind, dice, randomised=randomised)) for _ in range(STREAMS))


@pytest.mark.parametrize("kind", ["independent", "correlated", "drifting", "heavy"])
def test_the_false_alarm_rate_holds_at_all_looks_together(kind: str) -> None:
    assert false_alarms(kind, rejected_by_the_paired_test) <= BOUND


def test_a_test_for_one_look_would_exceed_the_bound() -> None:
    assert false_alarms("independent", rejected_by_a_z_test) > 2 * BOUND


def test_pairs_in_a_fixed_order_would_exceed_the_bound() -> None:
    assert false_alarms("drifting", rejected_by_the_paired_test, randomised=False) > 2 * BOUND


@pytest.mark.parametrize(("effect", "most"), [(4.0, 14), (1.0, 40), (0.5, 120)])
def test_an_effect_is_found_soon_however_it_is_scaled(effect: float, most: int) -> None:
    """``effect`` is the mean over the standard deviation."""
    delays = []
    for seed in range(30):
        dice, test = random.Random(seed), PairedTest(0.01)
        while not test.rejected:
            test.add(1e-3 * dice.gauss(effect, 1.0))
        delays.append(test.pairs)
    assert sorted(delays)[15] <= most


def test_one_pair_that_the_machine_held_up_does_not_hide_a_loss() -> None:
    test = PairedTest(0.01)
    for difference in [0.5] * 5 + [-1e3] + [0.5] * 20:
        test.add(difference)
    assert test.rejected


def test_the_other_direction_and_no_difference_are_no_evidence() -> None:
    test = PairedTest(0.01)
    for difference in [-1.0] * 10 + [0.0] * 10:
        test.add(difference)
    assert (test.pairs, test.rejected) == (20, False) and 0 < test.evidence < 1


def test_the_interval_of_a_mean() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0, 6.0])
    half = 1.96 * math.sqrt((4 + 1 + 0 + 9) / 4) / 2
    assert (low, high) == pytest.approx((3 - half, 3 + half))


def test_a_loss_of_either_figure_is_found_and_one_that_is_not_always_known_decides_if_it_is() -> None:
    for fallen in ("length", "speed"):
        test, figures = LossTest(["length", "speed"], rate=0.05, margin=0.1), {"length": 2.0, "speed": 9.0}
        while test.verdict is None:
            test.add({name: FigurePair(old, 0.5 * old if name == fallen else old) for name, old in figures.items()})
        assert test.verdict == (False, f"{fallen} fell") and test.evidence[fallen] >= 2 / 0.05
    test = LossTest(["length", "speed"], rate=0.05, margin=0.1)
    for _ in range(20):
        test.add({"length": FigurePair(2.0, 2.0)})
    assert test.verdict == (True, "a loss above 10% is ruled out") and test.pairs == 20
    test.add({"length": FigurePair(2.0, 2.0), "speed": FigurePair(9.0, 9.0)})
    assert test.verdict is None
