"""The trial of new weights: in windows of whole rounds they draft in turns with the old ones, until one is better.

A trial knows rounds alone, by which weights they were drafted, and what they delivered. Policies, and who drafts, are
:mod:`aurora_rl.serving.versions`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from aurora_rl.statistics import FIGURES, FigurePair, LossTest, TrialSums, figure_pairs


@dataclass(frozen=True, slots=True)
class RoundTrialRules:
    """How new weights are tried before they draft every round."""

    share: float = 0.5  # of the rounds, which they draft meanwhile, in (0, 0.5]
    window: int = 8  # rounds, at least 2; the first, in which the drafter's cache catches up, is not measured
    false_alarm_rate: float = 0.01  # chance that weights as good as the old ones are ever rolled back, at most
    margin: float = 0.05  # relative loss that is tolerated: weights are promoted once a larger one is ruled out
    # Rounds that they draft before they are promoted if no loss was proven; None waits for proof either way.
    max_rounds: int | None = 512
    seed: int = 0  # of the order of the windows


@dataclass(frozen=True, slots=True)
class RoundTrialVerdict:
    """How a trial ended."""

    promote: bool  # whether the new weights draft every round from now on
    reason: str  # what decided, in words
    rounds: int
    pairs: int  # of windows that were compared
    acceptance_length: FigurePair  # tokens per round and slot in these windows
    tokens_per_second: FigurePair | None  # None if the clock is so coarse that one version's windows took no time
    evidence: dict[str, float]  # of a loss, by figure, see LossTest.evidence


class RoundTrial:
    """Windows of new weights in turns with windows of the old ones, compared in pairs.

    A cycle begins with a pair of neighbouring windows, one of each, in an order that is drawn. As many rounds of the
    old weights follow as the share leaves. If the weights are equally good, the order alone decides the sign of a
    pair's difference, however rounds depend on those before them. :class:`~aurora_rl.statistics.LossTest` needs that.
    It compares acceptance length and tokens per second.

    - Rolled back: either figure is proven to be lower.
    - Promoted: of both figures a loss above the margin is ruled out; or ``max_rounds`` were drafted.

    Args:
        rules: How weights are tried.
        seed: Added to the seed of the rules; another for each trial.

    Attributes:
        rounds: Rounds so far.

    Example:
        >>> trial = RoundTrial(RoundTrialRules(window=4))
        >>> while (verdict := trial.observe(tokens=1 if trial.new else 3, occupied=1, seconds=1.0)) is None:
        ...     pass
        >>> verdict.promote, verdict.rounds, verdict.acceptance_length
        (False, 80, FigurePair(old=3.0, new=1.0))
    """

    def __init__(self, rules: RoundTrialRules, seed: int = 0) -> None:
        self._rules, self._random = rules, random.Random(rules.seed + seed)
        self.rounds = 0
        self._test = LossTest(FIGURES, rules.false_alarm_rate, rules.margin)
        self._totals = TrialSums(), TrialSums()  # old weights, new weights
        self._cycle = max(round(rules.window / rules.share), 2 * rules.window)
        self._begin_cycle()

    def _begin_cycle(self) -> None:
        self._at, self._new_first = 0, self._random.random() < 0.5
        self._window = TrialSums(), TrialSums()

    @property
    def new(self) -> bool:
        """Whether the new weights draft the next round."""
        window = self._at // self._rules.window
        return window < 2 and (window == 0) == self._new_first

    def observe(self, tokens: int, occupied: int, seconds: float) -> RoundTrialVerdict | None:
        """Take in a round that the weights named by :attr:`new` drafted; return the verdict once there is one.

        It delivered so many tokens to so many occupied slots, in so many seconds of wall time.
        """
        window, place = divmod(self._at, self._rules.window)
        if window < 2 and place:
            self._window[self.new].add(TrialSums(tokens, occupied, seconds))
        self.rounds += 1
        self._at += 1
        verdict = self._compare() if self._at == 2 * self._rules.window else None
        if self._at == self._cycle:
            self._begin_cycle()
        return verdict

    def _compare(self) -> RoundTrialVerdict | None:
        """Take in a pair of windows."""
        for total, sums in zip(self._totals, self._window, strict=True):
            total.add(sums)
        self._test.add(figure_pairs(*self._window))
        if (decided := self._test.verdict) is not None:
            return self._verdict(*decided)
        drafted, most = self._test.pairs * self._rules.window, self._rules.max_rounds
        if most is not None and drafted >= most:
            return self._verdict(True, f"no loss was proven in {drafted} rounds that they drafted")
        return None

    def _verdict(self, promote: bool, reason: str) -> RoundTrialVerdict:
        test, both = self._test, figure_pairs(*self._totals)
        length, speed = both["acceptance_length"], both.get("tokens_per_second")
        return RoundTrialVerdict(promote, reason, self.rounds, test.pairs, length, speed, test.evidence)
