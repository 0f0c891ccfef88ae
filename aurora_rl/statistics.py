"""Statistics of pairs: how sure a mean is, and a test that may be looked at after every pair."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from statistics import fmean, pstdev

# Effects that are bet on, in median absolute differences, and the largest difference that counts, in the same unit: a
# pair that the machine held up must not cost all evidence.
_EFFECTS = (0.1, 0.3, 0.9, 2.7)
_LARGEST = 3.0


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
        self.rejected = self.rejected or self.evidence >= self._threshold

    @property
    def evidence(self) -> float:
        """Evidence so far: 1 before the first pair, below it where signs are mixed."""
        return fmean(map(math.exp, self._log_wealth))
