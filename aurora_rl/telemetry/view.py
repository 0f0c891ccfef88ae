"""What a run shows and logs while it serves."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from aurora_rl.telemetry.log import MetricsLog, MetricsReader

if TYPE_CHECKING:
    from aurora_rl.cli.engines import Serving

_REMEMBERED = 100
"""Messages that are not told again. A peer may send ever new ones, so not all of them are kept."""


class LiveView:
    """Follows a run: a table for a terminal, a line elsewhere, and "status" events in the log.

    Args:
        serving: the serving half.
        log: gets "status", and "refused" and "learner_died" if that happens.
        reader: follows the run's metrics, where the learner's events are too.
        total: requests to serve.
        learner: says how the learner is: "running", or that it died.
    """

    def __init__(
        self, serving: Serving, log: MetricsLog, reader: MetricsReader, *, total: int, learner: Callable[[], str]
    ) -> None:
        self._serving, self._log, self._reader = serving, log, reader
        self._total, self._learner = total, learner
        self._told: deque[str] = deque(maxlen=_REMEMBERED)
        self._loss: float | None = None
        self._skipped = 0
        self._unwritten = False
        self._gate: dict[str, Any] | None = None
        # Of the requests completed since the last status: rounds by accepted drafts, and the shares of known tokens.
        self._accepted: Counter[int] = Counter()
        self._coverage: list[float] = []

    def follow(self) -> list[str]:
        """Read what is new in the log. Returns what the user must be told, each thing once."""
        told: list[str] = []
        for event in self._reader:
            if event["event"] == "train":
                self._loss = event["loss"]
            elif event["event"] == "step_skipped":
                if not self._skipped:
                    told.append(f"the learner skipped a step, and goes on: {event['reason']}")
                self._skipped = event["skipped"]
            elif event["event"] == "not_written":
                if not self._unwritten:
                    told.append(f"the learner could not write {event['what']}, and goes on: {event['reason']}")
                self._unwritten = True
            elif event["event"] == "gate":
                self._gate = event
            elif event["event"] == "request":
                self._accepted.update({int(count): rounds for count, rounds in event["accepted"].items()})
                if event["coverage"] is not None:
                    self._coverage.append(event["coverage"])
        state = self._learner()
        died = f"the learner {state}" if state.startswith("died") else None
        for name, news in (("refused", self._serving.refused), ("learner_died", died)):
            if news is not None and news not in self._told:
                self._told.append(news)
                self._log.write(name, reason=news)
                told.append(news)
        return told

    def log_status(self) -> None:
        """Write a "status" event about the time since the last one."""
        self.follow()
        server, accepted, coverage = self._serving.server, self._accepted, self._coverage
        rounds, speed = accepted.total(), server.rates(0.25)
        reached = [
            sum(n for count, n in accepted.items() if count >= d) for d in range(1, max(accepted, default=0) + 1)
        ]
        self._log.write(
            "status",
            requests=len(server.finished),
            version=server.version,
            acceptance_length=self._recent(),
            acceptance_by_position=[round(count / rounds, 4) for count in reached],
            tokens_per_second={"baseline": speed.baseline, "speculative": speed.speculative},
            depth=server.depth,
            coverage=sum(coverage) / len(coverage) if coverage else None,
            queue=self._serving.queued,
            dropped=self._serving.dropped,
            learner=self._learner(),
        )
        self._accepted, self._coverage = Counter(), []

    def _recent(self) -> float | None:
        """Acceptance length of the last tenth of the requests, at least eight."""
        server = self._serving.server
        count = len(server.finished)
        return server.acceptance(max(count - max(count // 10, 8), 0), count) if count else None

    def _rows(self) -> list[tuple[str, str]]:
        server = self._serving.server
        speed = server.rates(0.25)

        def show(value: float | None, digits: int = 2) -> str:
            return "–" if value is None else f"{value:.{digits}f}"

        gate = self._gate and f"{self._gate['difference']:+.3f} {'published' if self._gate['publish'] else 'refused'}"
        return [
            ("requests", f"{len(server.finished)}/{self._total}"),
            ("acceptance length", f"{show(self._recent())} at depth {server.depth}"),
            ("tokens/s plain · speculative", f"{show(speed.baseline, 1)} · {show(speed.speculative, 1)}"),
            ("speedup", show(speed.speedup)),
            ("version · swaps", f"{server.version} · {len(server.swap_ms)}"),
            ("queue · dropped", f"{self._serving.queued} · {self._serving.dropped}"),
            ("learner", self._serving.refused or self._learner()),
            ("learner loss · skipped steps", f"{show(self._loss, 3)} · {self._skipped}"),
            ("gate", gate or "–"),
        ]

    def table(self) -> Table:
        """The view of a terminal."""
        table = Table(show_header=False, title="aurora-rl")
        for name, value in self._rows():
            table.add_row(name, Text(value))  # text of peers may look like Rich's markup
        return table

    def line(self) -> str:
        """The view where output is not a terminal."""
        return " | ".join(f"{name} {value}" for name, value in self._rows())


def every(seconds: float, action: Callable[[], None]) -> Callable[[], None]:
    """A function that runs ``action`` when called, but not more often than this.

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
