"""Baseline windows, and tokens per second of plain and speculative decoding."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MIN_BASELINE_ROUNDS = 96
"""Plain rounds that a speedup needs: three windows of the usual length, since one window may be an accident."""


class BaselineWindows:
    """Says which rounds decode plainly: windows of whole rounds, placed at random, for a share of decode time.

    Args:
        share: Share of decode time that the windows take; 0 for none.
        window: Rounds of a window.
        seed: Seed of their placing.
    """

    def __init__(self, share: float, window: int, seed: int = 0) -> None:
        self._share, self._window, self._random = share, window, random.Random(seed)
        self._left = 0
        self._plain_seconds = 0.0
        # The first window comes early, so that a short run has one; nothing was measured yet to place it by.
        self._wait = 2.0 * self._random.random()

    @property
    def speculate(self) -> bool:
        """Whether the next round speculates."""
        return self._left == 0 or self._share == 0

    def spent(self, seconds: float) -> None:
        """Count the seconds of decode time that a round of the announced kind took."""
        if self._left:
            self._plain_seconds += seconds
            self._left -= 1
            if not self._left:
                mean = self._plain_seconds * (1 - self._share) / self._share
                self._wait, self._plain_seconds = mean * self._random.uniform(0.5, 1.5), 0.0
        elif self._share:
            self._wait -= seconds
            if self._wait <= 0:
                self._left = self._window


@dataclass(frozen=True, slots=True)
class Round:
    """One round of decoding.

    Attributes:
        speculative: False in baseline windows; all other rounds are the policy's, also those without drafts.
        occupied: Slots that took part.
        tokens: Tokens delivered.
        seconds: Wall time, prefill excluded.
        request: Requests completed before it.
        count: Rounds that were added up; 0 for time that belongs to no round.
        drafted: Slots for which drafts were asked, over all these rounds.
    """

    speculative: bool
    occupied: int
    tokens: int
    seconds: float
    request: int
    count: int = 1
    drafted: int = 0


class Rounds:
    """The rounds of a run in bounded memory: sums over rounds that are alike and close to each other.

    Rounds of one kind and number of occupied slots, drafted or not, are added up while the same request is the next to
    complete. Once more than ``buckets`` requests have completed, two neighbours share a bucket, then four, and so on.

    Args:
        buckets: The most parts of the run that are told apart; there are at least half as many in a long run.

    Example:
        >>> rounds = Rounds()
        >>> for tokens in (4, 3):
        ...     rounds.append(Round(True, 1, tokens, 1.0, request=0))
        >>> list(rounds)
        [Round(speculative=True, occupied=1, tokens=7, seconds=2.0, request=0, count=2, drafted=0)]
    """

    def __init__(self, buckets: int = 1024) -> None:
        self._buckets, self._width = buckets, 1  # requests in a bucket
        # Tokens, seconds, rounds and drafted slots.
        self._sums: dict[tuple[int, bool, int, bool], tuple[int, float, int, int]] = {}

    def append(self, round_: Round) -> None:
        """Add a round."""
        rounds = [round_]
        if round_.request >= self._buckets * self._width:
            rounds, self._sums = [*self, round_], {}
            while round_.request >= self._buckets * self._width:
                self._width *= 2
        for each in rounds:
            key = each.request // self._width, each.speculative, each.occupied, each.drafted > 0
            tokens, seconds, count, drafted = self._sums.get(key, (0, 0.0, 0, 0))
            sums = tokens + each.tokens, seconds + each.seconds, count + each.count, drafted + each.drafted
            self._sums[key] = sums

    def __iter__(self) -> Iterator[Round]:
        """Iterate over the sums; ``request`` is the first of their bucket."""
        for (bucket, speculative, occupied, _), (tokens, seconds, count, drafted) in self._sums.items():
            yield Round(speculative, occupied, tokens, seconds, bucket * self._width, count, drafted)


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second of both kinds.

    Attributes:
        baseline: Those of plain decoding; None if it was not measured.
        speculative: Those of all other decoding; None if it was not measured.
        baseline_rounds: Plain rounds that the rates are made of.
        break_even: Acceptance length at which the rounds that drafted would have been as fast as plain decoding; None
            if there were none, or the speedup is not known.
    """

    baseline: float | None
    speculative: float | None
    baseline_rounds: int = 0
    break_even: float | None = None

    @property
    def too_short(self) -> bool:
        """Whether plain decoding was measured, but over fewer than :data:`MIN_BASELINE_ROUNDS`."""
        return 0 < self.baseline_rounds < MIN_BASELINE_ROUNDS

    @property
    def speedup(self) -> float | None:
        """Speculative over baseline; None if one was not measured, or the baseline too shortly."""
        if not self.baseline or not self.speculative or self.too_short:
            return None
        return self.speculative / self.baseline


def rates(rounds: Iterable[Round]) -> Rates:
    """Compute tokens over wall time of each kind, at equal numbers of occupied slots.

    Each number of occupied slots at which both kinds were measured is weighted by the speculative time spent at it. So
    a kind does not gain from fuller batches that it happened to meet.

    Example:
        >>> plain = Round(False, 1, 100, 100.0, 0, count=100)
        >>> rounds = [Round(True, 1, 400, 200.0, 0), plain, Round(True, 2, 9, 1.0, 0)]
        >>> rates(rounds).speedup
        2.0

        A round of two slots that drafts for them takes 1.5 times as long as a plain one: 1.5 tokens a slot break even.

        >>> plain = Round(False, 2, 200, 100.0, 0, count=100)
        >>> rates([plain, Round(True, 2, 4, 1.5, 0, drafted=2)]).break_even
        1.5
    """
    rounds = list(rounds)
    tokens: dict[tuple[bool, int], int] = defaultdict(int)
    seconds: dict[tuple[bool, int], float] = defaultdict(float)
    plain: Counter[int] = Counter()
    for r in rounds:
        tokens[r.speculative, r.occupied] += r.tokens
        seconds[r.speculative, r.occupied] += r.seconds
        plain[r.occupied] += 0 if r.speculative else r.count

    def rate(kind: bool, occupied: int) -> float:
        return tokens[kind, occupied] / seconds[kind, occupied]

    # Every decoded round delivers a token; time without any, such as for recording, is no measurement of its own.
    measured = [key for key, count in tokens.items() if count]
    both = [o for kind, o in measured if kind and (False, o) in measured]
    if not both:
        overall: list[float | None] = []
        for kind in (False, True):
            count, time = (sum(v for (k, _), v in sums.items() if k == kind) for sums in (tokens, seconds))
            overall.append(count / time if count else None)
        baseline, speculative = overall
        return Rates(baseline, speculative, plain.total())
    weight = {o: seconds[True, o] for o in both}
    total = sum(weight.values())
    means = [sum(w * rate(kind, o) for o, w in weight.items()) / total for kind in (False, True)]
    plain_rounds, drafting = sum(plain[o] for o in both), [r for r in rounds if r.drafted and r.occupied in both]
    break_even = None
    if drafting and plain_rounds >= MIN_BASELINE_ROUNDS:
        # Without drafts each slot gets one token a round. What plain decoding would have delivered above that in the
        # same time is what the drafts had to bring.
        instead = sum(r.seconds * rate(False, r.occupied) for r in drafting)
        slots = sum(r.count * r.occupied for r in drafting)
        break_even = 1 + (instead - slots) / sum(r.drafted for r in drafting)
    return Rates(means[0], means[1], plain_rounds, break_even)
