"""When a process that died is started again, and what it said last."""

from __future__ import annotations

from pathlib import Path

LONGEST_WAIT_S = 60.0
"""Longest wait before a start, and how long a process must have lived for its end to count as the first."""
_DOUBLINGS = 6  # until the wait is the longest


def restart_wait(failures: int) -> float:
    """Return how many seconds to wait before a start: one, then twice as many each time, up to a minute.

    Args:
        failures: Starts in a row whose process died soon, this one left out.

    Example:
        >>> [restart_wait(failures) for failures in (0, 1, 5, 6, 10_000)]
        [1.0, 2.0, 32.0, 60.0, 60.0]
    """
    return min(2.0 ** min(failures, _DOUBLINGS), LONGEST_WAIT_S)


def last_line(log: Path) -> str:
    """Return the last line of the output of a command."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].removeprefix("aurora-rl: ") if lines else "it said nothing"
