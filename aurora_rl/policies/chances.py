"""What the chances that drafters state are worth, by what became of the nodes that they were stated of."""

from __future__ import annotations

_BINS, _DEPTHS = 5, 6
# What a stated chance is worth before anything is known, in expected acceptances of how many that counts, and after how
# many of them old counts are halved. Measured on the built-in traffic (docs/results.md), where lookup's chances came true
# four times in five, and a trained drafter's less often.
_RATIO, _WORTH, _MOST = 0.8, 4.0, 256.0


class Chances:
    """Corrects the chance that a node is accepted once its parent is, by depth and by stated chance in fifths.

    A drafter that was trained on true prefixes is too sure of its deeper nodes, lookup of texts that repeat each other.
    Each class of nodes has the ratio of acceptances and the sum of stated chances.

    Example:
        >>> chances = Chances()
        >>> round(chances.of(0.9, depth=2), 2)
        0.72
        >>> for _ in range(50):
        ...     chances.observe(0.9, depth=2, accepted=False)
        >>> round(chances.of(0.9, depth=2), 2), round(chances.of(0.5, depth=2), 2)
        (0.06, 0.4)
    """

    def __init__(self) -> None:
        # Acceptances, and the sum of stated chances, by depth and bin.
        self._counts = [[[0.0, 0.0] for _ in range(_BINS)] for _ in range(_DEPTHS)]

    def of(self, stated: float, depth: int) -> float:
        """Return the chance of a node at a depth, 1 below the root, whose parent is accepted."""
        accepted, expected = self._class(stated, depth)
        return min(stated * (accepted + _WORTH * _RATIO) / (expected + _WORTH), 1.0)

    def observe(self, stated: float, depth: int, accepted: bool) -> None:
        """Count a node whose parent was accepted."""
        counts = self._class(stated, depth)
        counts[0] += accepted
        counts[1] += stated
        if counts[1] > _MOST:
            counts[:] = [count / 2 for count in counts]

    def doubt(self) -> None:
        """Let what was counted weigh little: another version drafts from now on."""
        for by_bin in self._counts:
            for counts in by_bin:
                counts[:] = [count * min(_WORTH / max(counts[1], _WORTH), 1.0) for count in counts]

    def _class(self, stated: float, depth: int) -> list[float]:
        return self._counts[min(depth, _DEPTHS) - 1][min(int(stated * _BINS), _BINS - 1)]
