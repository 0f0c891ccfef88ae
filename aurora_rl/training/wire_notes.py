"""A learner's notes on its wire: what arrived from each engine, what was dropped, and who was refused."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tensordict import TensorDictBase

from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.training.shares import engine_of
from aurora_rl.training.wire_ends import TrajectorySource, WeightSink

_NOTE_S = 1.0  # a peer may send junk without an end
_ENGINES_S = 5.0


class WireNotes:
    """Writes the events "refused", "drops", "peers_refused" and "engines" when there is something new.

    Args:
        collector: Brings trajectories, and counts what it drops itself.
        publisher: Takes weights.
        log: Metrics of the run.
    """

    def __init__(self, collector: TrajectorySource, publisher: WeightSink, log: MetricsLog) -> None:
        self._collector, self._publisher, self._log = collector, publisher, log
        self._own, self._noted = Counter[str](), Counter[str]()  # drops by reason: the learner's, and those written
        self._refusal: str | None = None
        self._peers = 0
        self._next_note = self._next_engines = 0.0
        self._engines: dict[str, Any] = {}  # as written

    def arrived(self, trajectories: Iterable[TensorDictBase]) -> None:
        """Count trajectories that arrived."""
        for each in trajectories:
            versions = each["rounds", "policy_version"]
            self._collector.engines.arrived(engine_of(each), int(versions[-1]) if len(versions) else None)

    def dropped(self, reason: str, trajectories: Iterable[TensorDictBase]) -> None:
        """Count trajectories that the learner drops."""
        for each in trajectories:
            self._own[reason] += 1
            self._collector.engines.dropped(engine_of(each), reason)

    def write(self, steps: int, version: int) -> bool:
        """Write what is new after so many steps, with this version published. Return False within a second."""
        refusal = self._collector.handshake_error or self._publisher.error
        if refusal != self._refusal:
            self._refusal = refusal
            self._log.write("refused", reason=refusal)
        now = time.monotonic()
        if now < self._next_note:
            return False
        self._next_note = now + _NOTE_S
        self._write_drops(steps)
        if now >= self._next_engines:
            self._next_engines = now + _ENGINES_S
            self._write_engines(steps, version)
        return True

    def _write_drops(self, steps: int) -> None:
        dropped = self._collector.rejections + self._own
        if dropped != self._noted:
            self._log.write("drops", reasons=dict(dropped - self._noted), steps=steps)
            self._noted = dropped
        if (peers := self._collector.refused + self._publisher.refused) != self._peers:
            self._peers = peers
            self._log.write("peers_refused", peers=peers, steps=steps)

    def _write_engines(self, steps: int, version: int) -> None:
        if (engines := self._collector.engines.as_json(version)) != self._engines:
            self._engines = engines
            self._log.write("engines", engines=engines, steps=steps)

    def close(self, steps: int, version: int) -> None:
        """Write what was not written yet."""
        self._write_drops(steps)
        self._write_engines(steps, version)
