"""Number of rows that a drafter reads next to a round. It bounds how long a long prompt makes other requests wait."""

from __future__ import annotations

import statistics
import time
from collections import deque

# Initial, smallest and largest number of rows. Fewer rows save no time, and more only cost memory.
_FIRST_ROWS, _MIN_ROWS, _MAX_ROWS = 128, 64, 2048
# Share of the median time of the last so many rounds that the rows may take. It is the median because a round in which
# a request joins takes longer by itself.
_SHARE, _ROUNDS = 0.4, 8


class RowBudget:
    """Bounds the rows of the drafter's cache that are read next to a round, by the time that they take.

    They are to take less than half of a round. It then ends less than two rounds after the one before, as rounds with a
    chunk of a prompt do (``envs.chunked_prefill``).

    Attributes:
        rows: Rows of the next call.

    Example:
        >>> budget = RowBudget()
        >>> budget.begin(waits=True)
        128
        >>> budget.spent(rows=128, seconds=1.0)
        >>> for _ in range(2):  # rounds that take much less
        ...     rows = budget.begin(waits=True)
        >>> budget.spent(rows=128, seconds=1.0)
        >>> budget.rows
        102
    """

    def __init__(self) -> None:
        self.rows = _FIRST_ROWS
        self._rounds: deque[float] = deque(maxlen=_ROUNDS)
        self._began, self._reading = time.perf_counter(), 0.0

    def begin(self, *, waits: bool) -> int:
        """Begin a round, and return how many rows may be read. ``waits`` says if a request waits meanwhile."""
        now = time.perf_counter()
        if waits:
            self._rounds.append(max(now - self._began - self._reading, 0.0))
        self._began, self._reading = now, 0.0
        return self.rows

    def spent(self, rows: int, seconds: float) -> None:
        """Note how long it took to read so many rows."""
        self._reading += seconds
        if rows == self.rows and self._rounds:  # neither what is left of a text nor a text read whole
            usual = statistics.median(self._rounds)
            if seconds > _SHARE * usual:
                self.rows = max(self.rows * 4 // 5, _MIN_ROWS)
            elif seconds < _SHARE * usual / 4:  # a row costs more in a longer text
                self.rows = min(self.rows * 2, _MAX_ROWS)
