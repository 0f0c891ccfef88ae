"""Retention of trajectories: until their tenant's data is deleted, or until they are too old."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from tensordict import TensorDictBase

_MAX_INTERVAL_S = 1.0  # between two looks


def _captured(trajectory: TensorDictBase) -> float:
    """Return the Unix time of the end of a trajectory's request, which the collector notes."""
    return float(trajectory.get_non_tensor("captured", default=math.inf))


def is_deleted(deletions: Mapping[str, float]) -> Callable[[TensorDictBase], bool]:
    """Return the condition for trajectories of tenants whose data is deleted.

    Args:
        deletions: By tenant, the Unix time up to which its data is deleted.

    Example:
        >>> from tensordict import TensorDict
        >>> trajectory = TensorDict().set_non_tensor("tenant", "a").set_non_tensor("captured", 5.0)
        >>> [is_deleted(deletions)(trajectory) for deletions in ({"a": 6.0}, {"a": 4.0}, {"b": 6.0})]
        [True, False, False]
    """

    def gone(trajectory: TensorDictBase) -> bool:
        before = deletions.get(trajectory.get_non_tensor("tenant", default=""))
        return before is not None and _captured(trajectory) <= before

    return gone


class AgeLimit:
    """Says which trajectories are too old, and when it is time to look for them, so that no older one is learned from.

    Args:
        seconds: Most seconds since the end of the request; None keeps all.
        clock: Returns the Unix time.

    Example:
        >>> from tensordict import TensorDict
        >>> limit, trajectory = AgeLimit(10.0, lambda: 100.0), TensorDict().set_non_tensor("captured", 89.0)
        >>> limit.due(), limit.passed(trajectory), limit.due()
        (True, True, False)
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.time) -> None:
        self._seconds, self._clock = math.inf if seconds is None else seconds, clock
        self._every = min(self._seconds / 100, _MAX_INTERVAL_S)
        self._last = self._next = -math.inf

    def due(self) -> bool:
        """Return whether it is time to look at all trajectories; to be called before any is learned from."""
        now = self._clock()
        if self._last <= now < self._next or self._seconds == math.inf:  # a clock may be set back
            return False
        self._last, self._next = now, now + self._every
        return True

    def passed(self, trajectory: TensorDictBase) -> bool:
        """Return whether a trajectory is too old now, or will be before the next look."""
        return _captured(trajectory) < self._next - self._seconds
