"""Statistics of pairs: how sure a mean is, and a test that may be looked at after every pair."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from typing import Any, NamedTuple

# Effects that are bet on, in median absolute differences, and the largest difference that counts, in the same unit: a
# pair that the machine held up must not cost all evidence.
_EFFECTS = (0.1, 0.3, 0.9, 2.7)
_LARGEST = 3.0

FIGURES = ("acceptance_length", "tokens_per_second")
"""Figures by which new weights are compared with old ones. Of each, more is better."""


def mean_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of a mean (normal approximation). It is of a number of pairs that was fixed before.

    Example:
        >>> [round(end, 2) for end in mean_interval([1.0, 3.0])]
        [0.61, 3.39]
    """
    mean, half = fmean(differences), 1.96 * pstdev(differences) / math.sqrt(len(differences))
    return mean - half, mean + half


class PairedTest:
    """Tests after every pair whether differences tend to be positive, with one false-alarm rate for all looks together.

    Under the null hypothesis the sign of a difference is a fair coin, whatever its size and whatever came before. The
    evidence is the product of ``1 + tanh(effect * x)``, averaged over a few effects; ``x`` is the difference over the
    median absolute difference so far, cut at 3. It is a positive martingale that starts at 1, so it ever reaches ``1 /
    rate`` with probability ``rate`` at most (`Ramdas et al. 2020 <https://arxiv.org/abs/2009.03167>`_).

    Draw at random which member of a pair comes first (`Ham et al. 2022 <https://arxiv.org/abs/2210.08639>`_): then a
    drift has either sign as often.

    Args:
        rate: False-alarm rate, in (0, 1).

    Attributes:
        pairs: Pairs so far.
        rejected: Whether the evidence has reached ``1 / rate``; it stays what it was then.

    Example:
        >>> test = PairedTest(rate=0.01)
        >>> for pair in range(1, 20):
        ...     test.add(0.5)
        ...     if test.rejected:
        ...         break
        >>> pair
        9
    """

    def __init__(self, rate: float) -> None:
        self._threshold = 1 / rate
        self._sizes: list[float] = []  # absolute differences, rising
        self._log_wealth = [0.0] * len(_EFFECTS)
        self.pairs, self.rejected = 0, False

    def add(self, difference: float) -> None:
        """Take in the difference of a pair."""
        self.pairs += 1
        if self.rejected or not difference:
            return
        insort(self._sizes, abs(difference))
        size = self._sizes[len(self._sizes) // 2]
        x = max(-_LARGEST, min(difference / size, _LARGEST))
        self._log_wealth = [
            wealth + math.log1p(math.tanh(effect * x))
            for wealth, effect in zip(self._log_wealth, _EFFECTS, strict=True)
        ]
        self.rejected = self.evidence >= self._threshold

    @property
    def evidence(self) -> float:
        """Evidence so far: 1 before the first pair, below it where signs are mixed."""
        return fmean(map(math.exp, self._log_wealth))


@dataclass(slots=True)
class TrialSums:
    """Sums over what was served with some weights.

    Attributes:
        tokens: Tokens delivered.
        rounds: Rounds that delivered them, each counted for every slot that took part.
        seconds: Seconds that they took; None if somebody did not say it.
        requests: Requests, if they are counted.
    """

    tokens: int = 0
    rounds: int = 0
    seconds: float | None = 0.0
    requests: int = 0

    def add(self, more: TrialSums) -> None:
        """Add what was served with the same weights since."""
        self.tokens, self.rounds = self.tokens + more.tokens, self.rounds + more.rounds
        self.seconds = None if self.seconds is None or more.seconds is None else self.seconds + more.seconds
        self.requests += more.requests

    @property
    def figures(self) -> dict[str, float]:
        """Tokens per round and per second, those that are known, by the names of :data:`FIGURES`."""
        return {name: self.tokens / n for name, n in zip(FIGURES, (self.rounds, self.seconds), strict=True) if n}


class FigurePair(NamedTuple):
    """A figure of the old weights and of the new ones."""

    old: float
    new: float


def figure_pairs(old: TrialSums, new: TrialSums) -> dict[str, FigurePair]:
    """Return the figures that are known of both.

    Example:
        >>> figure_pairs(TrialSums(tokens=6, rounds=3, seconds=2.0), TrialSums(tokens=4, rounds=1, seconds=None))
        {'acceptance_length': FigurePair(old=2.0, new=4.0)}
    """
    return {name: FigurePair(before, new.figures[name]) for name, before in old.figures.items() if name in new.figures}


class LossTest:
    """Compares new weights with old ones in pairs, until a loss of a figure is proven or is ruled out for all.

    A pair is compared by the logarithm of new over old. A loss has a :class:`PairedTest` for each figure, and these
    share the false-alarm rate. That a loss above the margin is ruled out has another.

    Args:
        figures: Names of figures of which more is better.
        rate: Chance that weights as good as the old ones are ever found to be worse, at most; in (0, 1).
        margin: Relative loss that is tolerated, in (0, 1).

    Attributes:
        pairs: Pairs so far.

    Example:
        >>> test = LossTest(["acceptance_length"], rate=0.01, margin=0.05)
        >>> while test.verdict is None:
        ...     test.add({"acceptance_length": FigurePair(old=3.0, new=1.0)})
        >>> test.verdict, test.pairs
        ((False, 'acceptance length fell'), 9)
    """

    def __init__(self, figures: Sequence[str], rate: float, margin: float) -> None:
        self._margin, self.pairs = margin, 0
        self._lower = {name: PairedTest(rate / len(figures)) for name in figures}
        self._no_lower = {name: PairedTest(rate) for name in figures}

    def add(self, pair: Mapping[str, FigurePair]) -> None:
        """Take in a pair: each figure that is known of both, above 0."""
        self.pairs += 1
        for name, (old, new) in pair.items():
            gain = math.log(new / old)
            self._lower[name].add(-gain)
            self._no_lower[name].add(gain - math.log(1 - self._margin))

    @property
    def verdict(self) -> tuple[bool, str] | None:
        """Whether the new weights pass, and why, in words; None while neither is proven."""
        if worse := [name for name, test in self._lower.items() if test.rejected]:
            return False, f"{' and '.join(worse).replace('_', ' ')} fell"
        known = [test for test in self._no_lower.values() if test.pairs]
        if known and all(test.rejected for test in known):
            return True, f"a loss above {self._margin:.0%} is ruled out"
        return None

    @property
    def evidence(self) -> dict[str, float]:
        """Evidence of a loss, by figure: :attr:`PairedTest.evidence`."""
        return {name: test.evidence for name, test in self._lower.items()}


def rounded_verdict(verdict: Any) -> dict[str, Any]:
    """Return a verdict on new weights as JSON values for the log.

    Args:
        verdict: Dataclass with figures as :class:`FigurePair`, kept to 4 decimals, and ``evidence`` by figure, kept to
            4 significant digits. Other fields stay what they are.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Verdict:
        ...     promote: bool
        ...     speed: FigurePair | None
        ...     evidence: dict[str, float]
        >>> rounded_verdict(Verdict(True, FigurePair(old=1.23456, new=2.0), {"speed": 1234.56}))
        {'promote': True, 'speed': {'old': 1.2346, 'new': 2.0}, 'evidence': {'speed': 1235.0}}
    """
    values = asdict(verdict)
    for name, value in values.items():
        if isinstance(value, FigurePair):
            values[name] = {"old": round(value.old, 4), "new": round(value.new, 4)}
    values["evidence"] = {name: float(f"{value:.4g}") for name, value in values["evidence"].items()}
    return values
