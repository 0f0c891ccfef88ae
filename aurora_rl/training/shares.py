"""Engines' shares of what a learner keeps and learns from, so that an engine that floods it crowds out no other."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import islice

from tensordict import TensorDictBase


def engine_of(trajectory: TensorDictBase) -> str:
    """Return the name of the engine that sent a trajectory, as its collector noted it; empty without one."""
    return str(trajectory.get_non_tensor("source", default=""))


def in_turns(engines: Sequence[str]) -> list[int]:
    """Return the places of a sequence in an order in which its engines take turns; those of one engine keep theirs.

    Example:
        >>> in_turns(["a", "a", "a", "b", "c"])
        [0, 3, 4, 1, 2]
    """
    turns, before = Counter[str](), list[int]()
    for engine in engines:
        before.append(turns[engine])
        turns[engine] += 1
    return sorted(range(len(engines)), key=before.__getitem__)


class RecentEngines:
    """The engines that sent the last trajectories: one that has gone has no claim on a share any more.

    Args:
        most: Trajectories that are looked back on.

    Example:
        >>> recent = RecentEngines(2)
        >>> recent.extend(["a", "b", "b"])
        >>> "a" in recent, "b" in recent, len(recent)
        (False, True, 1)
    """

    def __init__(self, most: int) -> None:
        self._last: deque[str] = deque(maxlen=most)
        self._count = Counter[str]()

    def extend(self, engines: Iterable[str]) -> None:
        """Note the engines of the next trajectories."""
        for engine in engines:
            if len(self._last) == self._last.maxlen:
                oldest = self._last[0]
                self._count[oldest] -= 1
                if not self._count[oldest]:
                    del self._count[oldest]
            self._last.append(engine)
            self._count[engine] += 1

    def __contains__(self, engine: str) -> bool:
        """Return whether the engine sent one of the last trajectories."""
        return engine in self._count

    def __len__(self) -> int:
        """Return how many engines sent the last trajectories."""
        return len(self._count)

    def of_last(self, most: int) -> set[str]:
        """Return the engines of the last ``most`` trajectories, or of all that are looked back on."""
        return set(islice(reversed(self._last), most))

    def state(self) -> list[str]:
        """Return the engines of the last trajectories, oldest first: what :meth:`extend` takes."""
        return list(self._last)
