"""How long a client waits, and for what."""

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
        scheduled: Time of the monotonic clock at which the request got a slot.

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
        self._arrived = self._last = self.scheduled = time.monotonic()
        self._first: float | None = None
        self._later_tokens = 0

    def delivered(self, tokens: int) -> None:
        """Note that a round has delivered so many tokens."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._observe("request_queue_time", self.scheduled - self._arrived)
            self._observe("time_to_first_token", now - self._arrived)
        else:
            self._later_tokens += tokens
            self._observe("inter_token_latency", now - self._last)
        self._last = now

    def completed(self) -> None:
        """Note the end of the request."""
        if self._first is not None and self._later_tokens:
            self._observe("request_time_per_output_token", (self._last - self._first) / self._later_tokens)
        self._observe("e2e_request_latency", time.monotonic() - self._arrived)
