"""Times that a client waits, and for what."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

Wait = Literal[
    "request_queue_time",
    "time_to_first_token",
    "inter_token_latency",
    "request_time_per_output_token",
    "e2e_request_latency",
]
"""What is timed, by vLLM's names; :data:`aurora_rl.telemetry.prometheus.METRICS` says what each is."""


class RequestTimes:
    """The times of one request. It begins when the object is made.

    Args:
        observe: Called with what was waited for, and for how many seconds.

    Attributes:
        scheduled: Time of the monotonic clock at which the request got a slot; None if nobody says when it did.

    Example:
        >>> told = []
        >>> times = RequestTimes(lambda wait, seconds: told.append(wait))
        >>> for tokens in (1, 3):
        ...     times.delivered(tokens)
        >>> times.completed()
        >>> told[1:3]
        ['time_to_first_token', 'inter_token_latency']
    """

    __slots__ = ("_arrived", "_first", "_later_tokens", "_last", "_observe", "scheduled")

    def __init__(self, observe: Callable[[Wait, float], None]) -> None:
        self._observe = observe
        self._arrived = self._last = time.monotonic()
        self.scheduled: float | None = self._arrived
        self._first: float | None = None
        self._later_tokens = 0

    def delivered(self, tokens: int) -> None:
        """Note that a round has delivered so many tokens."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            if self.scheduled is not None:
                self._observe("request_queue_time", self.scheduled - self._arrived)
            self._observe("time_to_first_token", now - self._arrived)
        else:
            self._later_tokens += tokens
            self._observe("inter_token_latency", now - self._last)
        self._last = now

    def abandoned(self, *, waiting: bool) -> None:
        """Note that the client is gone; ``waiting`` if the request still had no slot."""
        if self._first is None and self.scheduled is not None:
            self._observe("request_queue_time", (time.monotonic() if waiting else self.scheduled) - self._arrived)

    def completed(self, more_tokens: int = 0) -> None:
        """Note the end of the request, and that later deliveries had so many tokens more than was said."""
        later = self._later_tokens + more_tokens
        if self._first is not None and later > 0:
            self._observe("request_time_per_output_token", (self._last - self._first) / later)
        self._observe("e2e_request_latency", time.monotonic() - self._arrived)
