"""Trials of new weights on simulated rounds: what is promoted, what is rolled back, and what that costs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from aurora_rl.serving.canary import RoundTrial, RoundTrialRules, RoundTrialVerdict
from aurora_rl.statistics import rounded_verdict

Rounds = Callable[[bool], tuple[int, float]]
"""Tokens and seconds of a round, by whether the new weights draft it."""


def decided(
    rules: RoundTrialRules, rounds: Rounds, seed: int = 0, most: int = 10_000
) -> tuple[RoundTrialVerdict | None, int]:
    """The verdict, and how many rounds the new weights drafted until then."""
    trial, drafted = RoundTrial(rules, seed), 0
    for _ in range(most):
        new = trial.new
        drafted += new
        tokens, seconds = rounds(new)
        if (verdict := trial.observe(tokens, 1, seconds)) is not None:
            return verdict, drafted
    return None, drafted


def served(accept: float, accept_new: float, seed: int, seconds_new: float = 1.0) -> Rounds:
    """Chains of four drafts, of which each is accepted by a chance that wanders with the text."""
    dice, mood = random.Random(seed), 0.0

    def rounds(new: bool) -> tuple[int, float]:
        nonlocal mood
        mood = 0.97 * mood + dice.gauss(0, 0.05)
        chance, tokens = min(max((accept_new if new else accept) + mood, 0.0), 1.0), 1
        while tokens <= 4 and dice.random() < chance:
            tokens += 1
        return tokens, (seconds_new if new else 1.0) * dice.uniform(0.9, 1.1)

    return rounds


def constant(new: bool) -> tuple[int, float]:
    """A new drafter of which nothing is accepted."""
    return (1, 1.1) if new else (3, 1.1)


def test_windows_of_the_new_weights_take_their_share_and_have_a_neighbour_of_the_old() -> None:
    trial, orders = RoundTrial(RoundTrialRules(share=0.25, window=4, max_rounds=None)), set()
    for _ in range(20):
        cycle = []
        for _ in range(16):
            cycle.append(trial.new)
            trial.observe(2, 1, 1.0)
        orders.add(tuple(cycle))
    old, new = [False] * 4, [True] * 4
    assert orders == {(*old, *new, *old, *old), (*new, *old, *old, *old)}


def test_half_of_the_rounds_are_pairs_alone() -> None:
    trial = RoundTrial(RoundTrialRules(share=0.5, window=3, max_rounds=None))
    drafted = 0
    for _ in range(600):
        drafted += trial.new
        trial.observe(2, 1, 1.0)
    assert drafted == 300


@pytest.mark.parametrize("share", [0.5, 0.2, 0.05])
def test_a_useless_drafter_costs_a_bounded_number_of_rounds(share: float) -> None:
    """11 pairs of windows at most, hence 88 rounds: a twentieth of any 1,760 rounds, were they to deliver nothing."""
    for seed in range(20):
        verdict, drafted = decided(RoundTrialRules(share=share), constant, seed)
        assert verdict is not None and not verdict.promote and drafted <= 88
        assert verdict.reason == "acceptance length and tokens per second fell"
        assert (verdict.acceptance_length.old, verdict.acceptance_length.new) == (3, 1)


def test_a_drafter_that_is_slow_is_rolled_back_though_as_much_is_accepted() -> None:
    verdict, _ = decided(RoundTrialRules(), served(0.6, 0.6, seed=0, seconds_new=1.6))
    assert verdict is not None and not verdict.promote and verdict.reason == "tokens per second fell"


def test_a_drafter_that_is_fast_is_rolled_back_though_if_less_is_accepted() -> None:
    verdict, _ = decided(RoundTrialRules(), served(0.8, 0.3, seed=0, seconds_new=0.3))
    assert verdict is not None and not verdict.promote and verdict.reason == "acceptance length fell"


@pytest.mark.parametrize("takes", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_a_clock_too_coarse_for_a_round_leaves_the_tokens_per_round_to_decide(takes: tuple[float, float]) -> None:
    verdict, _ = decided(RoundTrialRules(), lambda new: (1 if new else 3, takes[new]))
    assert verdict is not None and not verdict.promote and verdict.reason == "acceptance length fell"
    assert (verdict.acceptance_length.old, verdict.acceptance_length.new) == (3, 1)
    assert verdict.tokens_per_second is None and rounded_verdict(verdict)["tokens_per_second"] is None


def test_a_better_drafter_is_promoted_before_the_last_round() -> None:
    verdict, _ = decided(RoundTrialRules(), served(0.4, 0.8, seed=0))
    assert verdict is not None and verdict.promote and verdict.rounds < 512
    assert verdict.reason == "a loss above 5% is ruled out"
    assert verdict.acceptance_length.new > verdict.acceptance_length.old
    assert verdict.pairs == verdict.rounds // 16


def test_an_equal_drafter_is_promoted_at_last_unless_it_may_be_tried_for_ever() -> None:
    rules = RoundTrialRules(max_rounds=48, margin=1e-9)
    verdict, _ = decided(rules, served(0.6, 0.6, seed=0))
    assert verdict is not None and verdict.promote and verdict.rounds == 96
    assert verdict.reason == "no loss was proven in 48 rounds that they drafted"
    assert decided(replace(rules, max_rounds=None), served(0.6, 0.6, seed=0), most=2000)[0] is None


def test_an_equal_drafter_is_rarely_rolled_back() -> None:
    rules, trials = RoundTrialRules(false_alarm_rate=0.1, max_rounds=256), 150
    verdicts = [decided(rules, served(0.6, 0.6, seed), seed)[0] for seed in range(trials)]
    alarms = sum(not verdict.promote for verdict in verdicts if verdict is not None)
    assert alarms <= 0.1 * trials + 3 * math.sqrt(0.1 * 0.9 * trials)


def test_the_first_round_of_a_window_is_not_measured() -> None:
    """Its drafter's cache catches up. The new drafter's takes for ever here, and delivers nothing else than the old."""
    before = False

    def rounds(new: bool) -> tuple[int, float]:
        nonlocal before
        first, before = new and not before, new
        return (1, 50.0) if first else (3, 1.0)

    # Windows of the new weights that follow each other are one to `before`; at a share below one half there are none.
    verdict, _ = decided(RoundTrialRules(share=0.4, window=5), rounds)
    assert verdict is not None and verdict.promote
    assert verdict.acceptance_length == (3.0, 3.0) and verdict.tokens_per_second == (3.0, 3.0)
