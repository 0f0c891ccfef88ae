"""Engines' shares of what a learner keeps and learns from, so that an engine that floods it crowds out no other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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
