"""Warnings that a peer can cause, at a bounded rate."""

from __future__ import annotations

import logging
import time
from collections import Counter


class Throttle:
    r"""Logs at most one warning of a kind in so many seconds, and says how many it left out.

    Example:
        >>> import io
        >>> logger, text = logging.Logger("wire"), io.StringIO()
        >>> logger.addHandler(logging.StreamHandler(text))
        >>> throttle = Throttle(logger, seconds=3600)
        >>> for number in range(1000):
        ...     throttle.warning("malformed", "message %d is malformed", number)
        >>> text.getvalue()
        'message 0 is malformed\n'
    """

    def __init__(self, logger: logging.Logger, seconds: float = 60.0) -> None:
        self._logger, self._seconds = logger, seconds
        self._next: dict[str, float] = {}
        self._left_out = Counter[str]()

    def warning(self, kind: str, text: str, *values: object) -> None:
        """Log ``text % values``, unless a warning of this kind was logged lately. There are few kinds, no peer's."""
        now = time.monotonic()
        if now < self._next.get(kind, 0.0):
            self._left_out[kind] += 1
            return
        self._next[kind] = now + self._seconds
        if left_out := self._left_out.pop(kind, 0):
            text += f" ({left_out} like it were not logged)"
        self._logger.warning(text, *values)
