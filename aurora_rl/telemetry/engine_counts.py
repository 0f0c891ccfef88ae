"""Counts of trajectories by engine. Senders choose their names, so the number of engines that are kept is bounded."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

from aurora_rl.telemetry.history import staleness

_MAX_ENGINES = 64
_OTHERS, _UNNAMED = "(others)", "(unnamed)"


@dataclass(slots=True)
class _Counts:
    trajectories: int = 0
    version: int | None = None
    drops: Counter[str] = field(default_factory=Counter)


class EngineCounts:
    """Counts by engine, of the 64 that were counted last. Those of all others are added up as ``(others)``.

    Example:
        >>> counts = EngineCounts()
        >>> counts.arrived("a", 3)
        >>> counts.dropped("a", "invalid")
        >>> counts.as_json(published=5)
        {'a': {'trajectories': 1, 'version': 3, 'staleness': 2, 'drops': {'invalid': 1}}}
    """

    def __init__(self) -> None:
        self._engines: OrderedDict[str, _Counts] = OrderedDict()  # counted last comes last
        self._others = _Counts()

    def arrived(self, engine: str, version: int | None) -> None:
        """Count a trajectory that arrived, whose last round a version of the weights drafted; None if it has none."""
        counts = self._of(engine)
        counts.trajectories += 1
        counts.version = counts.version if version is None else version

    def dropped(self, engine: str, reason: str) -> None:
        """Count a trajectory that was dropped."""
        self._of(engine).drops[reason] += 1

    def _of(self, engine: str) -> _Counts:
        counts = self._engines.setdefault(engine or _UNNAMED, _Counts())
        self._engines.move_to_end(engine or _UNNAMED)
        if len(self._engines) > _MAX_ENGINES:
            _, gone = self._engines.popitem(last=False)
            self._others.trajectories += gone.trajectories
            self._others.drops.update(gone.drops)
        return counts

    def as_json(self, published: int) -> dict[str, dict[str, Any]]:
        """Return the counts by engine, and how many versions were published after the one that each drafts with."""
        known = {**self._engines, **({_OTHERS: self._others} if self._others != _Counts() else {})}
        return {
            engine: {
                "trajectories": counts.trajectories,
                "version": counts.version,
                "staleness": staleness(published, counts.version),
                "drops": dict(counts.drops),
            }
            for engine, counts in known.items()
        }
