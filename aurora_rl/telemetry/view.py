"""What a run shows and logs while it serves."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rich.table import Table
from rich.text import Text

from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.telemetry.report import show, show_speedup
from aurora_rl.telemetry.stats import Stats


class Server(Protocol):
    """The serving half of a run, whatever its engine.

    Attributes:
        stats: Statistics of the run so far.
    """

    stats: Stats

    @property
    def depth(self) -> int:
        """Longest path of the trees that are drafted now."""

    @property
    def queued(self) -> int:
        """Trajectories that wait to be sent."""

    @property
    def dropped(self) -> int:
        """Trajectories that no learner took."""

    @property
    def refused(self) -> str | None:
        """Why the learner refuses this server; None if it does not."""

    def step(self) -> bool:
        """Serve for a moment. Return False if there was nothing to do."""

    def save_drafter(self, folder: str | os.PathLike[str]) -> None:
        """Save the drafter that served last, if it has weights."""

    def close(self) -> None:
        """Send the trajectories that can still be sent, and close."""


class LiveView:
    """Follows a run: a table for a terminal, a line elsewhere, and "status" events in the log.

    Args:
        server: Serving half of the run.
        log: Gets "status", and "refused" and "learner_died" if that happens.
        reader: Follows the run's metrics, where the learner's events are too.
        total: Requests to serve; None if there is no end to them.
        learner: Says how the learner is: "running", or that it died.
        followers: Each is called with every event, in order: what else shows the run.

    Attributes:
        unsaved: Why the learner could not write its last training state; None if it could.
    """

    def __init__(
        self,
        server: Server,
        log: MetricsLog,
        reader: MetricsReader,
        *,
        total: int | None,
        learner: Callable[[], str],
        followers: Sequence[Callable[[dict[str, Any]], None]] = (),
    ) -> None:
        self._server, self._log, self._reader = server, log, reader
        self._total, self._learner, self._followers = total, learner, followers
        self._told: deque[str] = deque(maxlen=100)  # a peer may send ever new messages
        self._loss: float | None = None
        self._skipped = 0
        self._unwritten = False
        self.unsaved: str | None = None
        self._gate: dict[str, Any] | None = None
        # Of the requests completed since the last status: rounds by accepted drafts, and the shares of known tokens.
        self._accepted: Counter[int] = Counter()
        self._coverage: list[float] = []
        self._drafted: Counter[str] = Counter()  # at the last status

    def read(self) -> list[str]:
        """Read what is new in the log. Return what the user must be told, each thing once."""
        told: list[str] = []
        for event in self._reader:
            for follower in self._followers:
                follower(event)
            if event["event"] == "train":
                self._loss = event["loss"]
            elif event["event"] == "step_skipped":
                if not self._skipped:
                    told.append(f"the learner skipped a step, and goes on: {event['reason']}")
                self._skipped = event["skipped"]
            elif event["event"] == "checkpoint":
                self.unsaved = None
            elif event["event"] == "not_written":
                if event["what"] == "the training state":
                    self.unsaved = event["reason"]
                if not self._unwritten:
                    told.append(f"the learner could not write {event['what']}, and goes on: {event['reason']}")
                self._unwritten = True
            elif event["event"] == "gate":
                self._gate = event
            elif event["event"] == "request":
                self._accepted.update({int(count): rounds for count, rounds in event["accepted"].items()})
                if event["coverage"] is not None:
                    self._coverage.append(event["coverage"])
        return told

    def follow(self) -> list[str]:
        """Read what is new in the log, and ask both halves. Return what the user must be told, each thing once."""
        told, state = self.read(), self._learner()
        died = f"the learner {state}" if state.startswith("died") else None
        for name, news in (("refused", self._server.refused), ("learner_died", died)):
            if news is not None and news not in self._told:
                self._told.append(news)
                self._log.write(name, reason=news)
                told.append(news)
        return told

    def log_status(self) -> None:
        """Write a "status" event about the time since the last one."""
        self.follow()
        server, accepted, coverage = self._server, self._accepted, self._coverage
        stats, rounds, speed = server.stats, accepted.total(), server.stats.rates(0.25)
        positions = range(1, max(accepted, default=0) + 1)
        reached = [sum(n for count, n in accepted.items() if count >= position) for position in positions]
        self._log.write(
            "status",
            requests=len(stats.finished),
            version=stats.version,
            acceptance_length=self._recent(),
            acceptance_by_position=[round(count / rounds, 4) for count in reached],
            tokens_per_second={"baseline": speed.baseline, "speculative": speed.speculative},
            speedup=speed.speedup,
            baseline_rounds=speed.baseline_rounds,
            drafted=dict(stats.drafted - self._drafted),
            depth=server.depth,
            coverage=sum(coverage) / len(coverage) if coverage else None,
            queue=server.queued,
            dropped=server.dropped,
            learner=self._learner(),
        )
        self._accepted, self._coverage, self._drafted = Counter(), [], stats.drafted.copy()

    def _recent(self) -> float | None:
        """Return the acceptance length of the last tenth of the requests, at least eight."""
        stats = self._server.stats
        count = len(stats.finished)
        return stats.acceptance(max(count - max(count // 10, 8), 0), count)

    def _rows(self) -> list[tuple[str, str]]:
        server, stats = self._server, self._server.stats
        speed = stats.rates(0.25)
        gate = self._gate and f"{self._gate['difference']:+.3f} {'published' if self._gate['publish'] else 'refused'}"
        return [
            ("requests", str(len(stats.finished)) + (f"/{self._total}" if self._total is not None else "")),
            ("acceptance length", f"{show(self._recent())} at depth {server.depth}"),
            ("tokens/s plain · speculative", f"{show(speed.baseline, 1)} · {show(speed.speculative, 1)}"),
            ("speedup", show_speedup(speed)),
            ("version · swaps", f"{stats.version} · {len(stats.swap_ms)}"),
            ("queue · dropped", f"{server.queued} · {server.dropped}"),
            ("learner", self._server.refused or self._learner()),
            ("learner loss · skipped steps", f"{show(self._loss, 3)} · {self._skipped}"),
            ("gate", gate or "–"),
        ]

    def table(self) -> Table:
        """Lay out the view of a terminal."""
        table = Table(show_header=False, title="aurora-rl")
        for name, value in self._rows():
            table.add_row(name, Text(value))  # text of peers may look like Rich's markup
        return table

    def line(self) -> str:
        """Format the view for output that is not a terminal."""
        return " | ".join(f"{name} {value}" for name, value in self._rows())


def every(seconds: float, action: Callable[[], None]) -> Callable[[], None]:
    """Return a function that runs ``action`` when called, but not more often than this.

    Example:
        >>> seen = []
        >>> tick = every(60.0, lambda: seen.append(1))
        >>> tick()
        >>> seen
        []
    """
    due = time.monotonic() + seconds

    def maybe() -> None:
        nonlocal due
        if time.monotonic() >= due:
            action()
            due = time.monotonic() + seconds

    return maybe
