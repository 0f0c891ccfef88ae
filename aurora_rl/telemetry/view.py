"""The live view of a run, and its log while it serves."""

from __future__ import annotations

import datetime
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rich.table import Table
from rich.text import Text

from aurora_rl.telemetry.history import DRAFTED, RunHistory, shares, staleness
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.telemetry.report import show, show_speedup
from aurora_rl.telemetry.stats import Stats

_STATE = "the training state"  # as the learner calls it, which saves it again and again


class Server(Protocol):
    """The serving half of a run, whatever its engine."""

    stats: Stats

    @property
    def depth(self) -> int:
        """Longest path of the trees that are drafted now."""

    @property
    def queued(self) -> int:
        """Trajectories that wait to be sent."""

    @property
    def drops(self) -> Counter[str]:
        """Trajectories that no learner took, by reason."""

    @property
    def sent(self) -> int:
        """Trajectories handed to a learner."""

    @property
    def refused(self) -> str | None:
        """Why the learner refuses this server; None if it does not."""

    def step(self) -> bool:
        """Serve for a moment. Return False if there was nothing to do."""

    def save_drafter(self, folder: str | os.PathLike[str]) -> None:
        """Save the drafter that served last, if it has weights."""

    def close(self) -> None:
        """Send the trajectories that can still be sent, and close."""


class Traffic(Protocol):
    """Requests that a run brings itself: how many there are, and how many have completed."""

    total: int
    answered: int


class LiveView:
    """Follows a run: a table for a terminal, a line elsewhere, and "status" events in the log.

    Args:
        server: Serving half of the run.
        log: Gets "status", and "refused" and "learner_died" if that happens.
        reader: Follows the run's metrics, where the learner's events are too.
        history: Gets every event; what the view shows of them.
        traffic: Requests of the run itself; None if clients alone ask, without an end.
        learner: Says how the learner is: "running", or that it died.
        clients: Returns how clients fare, the last fields of "status"; without a front for them there are none.
        followers: Further callables that get every event, in order.

    Attributes:
        unsaved: Why the learner could not write its last training state; None if it could.
    """

    def __init__(
        self,
        server: Server,
        log: MetricsLog,
        reader: MetricsReader,
        history: RunHistory,
        *,
        traffic: Traffic | None,
        learner: Callable[[], str],
        clients: Callable[[], dict[str, Any]] = dict,
        followers: Sequence[Callable[[dict[str, Any]], None]] = (),
    ) -> None:
        self._server, self._log, self._reader, self._history = server, log, reader, history
        self._traffic, self._learner, self._clients = traffic, learner, clients
        self._followers = [history.follow, *followers]
        self._began = time.monotonic()
        self._died = False
        self._told: deque[str] = deque(maxlen=100)  # a peer may send ever new messages
        self._skipped = False
        self._printed: list[tuple[str, str]] = []
        self._unwritten: set[str] = set()  # told already
        self.unsaved: str | None = None
        # Rounds by accepted drafts, and shares of known tokens, of the requests completed since the last status.
        self._accepted: Counter[int] = Counter()
        self._coverage: list[float] = []
        self._drafted: Counter[str] = Counter()  # at the last status

    def read(self) -> list[str]:
        """Read what is new in the log. Return what the user must be told, each thing once."""
        told: list[str] = []
        for event in self._reader:
            for follower in self._followers:
                follower(event)
            if event["event"] == "step_skipped":
                if not self._skipped:
                    told.append(f"the learner skipped a step, and goes on: {event['reason']}")
                self._skipped = True
            elif event["event"] == "checkpoint":
                self.unsaved = None
                self._unwritten.discard(_STATE)
            elif event["event"] == "not_written":
                if event["what"] == _STATE:
                    self.unsaved = event["reason"]
                if event["what"] not in self._unwritten:
                    told.append(f"the learner could not write {event['what']}, and goes on: {event['reason']}")
                self._unwritten.add(event["what"])
            elif event["event"] in ("request", "requests"):
                self._accepted.update({int(count): rounds for count, rounds in event["accepted"].items()})
                if event.get("coverage") is not None:
                    self._coverage.append(event["coverage"])
        return told

    def follow(self) -> list[str]:
        """Read what is new in the log, and ask both halves. Return what the user must be told, each thing once."""
        told, state, refused = self.read(), self._learner(), self._server.refused
        news = []
        if refused is not None and refused not in self._told:
            self._told.append(refused)
            news.append(("refused", refused))
        died = state.startswith("died")
        if died and not self._died:  # a second death is told, too, also with the same status
            news.append(("learner_died", f"the learner {state}"))
        self._died = died
        for event, reason in news:
            self._log.write(event, reason=reason)
            told.append(reason)
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
            acceptance_length=stats.last_acceptance,
            acceptance_by_position=[round(count / rounds, 4) for count in reached],
            tokens_per_second={"baseline": speed.baseline, "speculative": speed.speculative},
            speedup=speed.speedup,
            baseline_rounds=speed.baseline_rounds,
            break_even=speed.break_even,
            drafted=dict(stats.drafted - self._drafted),
            depth=server.depth,
            coverage=sum(coverage) / len(coverage) if coverage else None,
            staleness=staleness(self._history.published, stats.version),
            queue=server.queued,
            dropped=dict(self.drops),
            learner=server.refused or self._learner(),
            **self._clients(),
        )
        self._accepted, self._coverage, self._drafted = Counter(), [], stats.drafted.copy()

    @property
    def drops(self) -> Counter[str]:
        """Trajectories that were lost so far, by reason: before they were sent, and after that."""
        return self._server.drops + self._history.drops

    def _progress(self) -> list[tuple[str, str]]:
        """Return how many requests are done and for how long the run goes; of traffic also how long it still takes."""
        traffic, done, elapsed = self._traffic, len(self._server.stats.finished), time.monotonic() - self._began
        if traffic is None:
            return [("requests", str(done)), ("elapsed", _time(elapsed))]
        answered, of_clients = traffic.answered, done - traffic.answered
        requests = f"{answered}/{traffic.total}" + (f" · {of_clients} of clients" if of_clients else "")
        left = f" · {_time(elapsed / answered * (traffic.total - answered))}" if answered else ""
        return [("requests", requests), ("elapsed · left", _time(elapsed) + left)]

    def _rows(self) -> list[tuple[str, str]]:
        server, stats, history = self._server, self._server.stats, self._history
        speed = stats.rates(0.25)
        gate = "–"
        if history.gates:
            last = history.gates[-1]
            gate = f"{last.difference:+.3f} {'published' if last.publish else 'refused'}"
        drafted = " · ".join(f"{DRAFTED[name]} {share:.0%}" for name, share in shares(history.drafted).items())
        return [
            *self._progress(),
            ("acceptance length", f"{show(stats.last_acceptance)} at depth {server.depth}"),
            ("drafted", drafted or "–"),
            ("tokens/s plain · speculative", f"{show(speed.baseline, 1)} · {show(speed.speculative, 1)}"),
            ("speedup", show_speedup(speed)),
            ("version · swaps", f"{stats.version} · {len(stats.swap_ms)}"),
            ("queue · dropped", f"{server.queued} · {self.drops.total()}"),
            ("learner", server.refused or self._learner()),
            ("learner loss · skipped steps", f"{show(history.learner.loss, 3)} · {history.learner.skipped}"),
            ("gate", gate),
            ("trial", _trial(history)),
            *[("drafter", f"{fault.cause}: {fault.action}") for fault in history.faults[-1:]],
        ]

    def table(self) -> Table:
        """Lay out the view of a terminal; two figures say how they went so far."""
        points = self._history.points
        trends = {
            "acceptance length": trend([point.acceptance for point in points]),
            "speedup": trend([point.rates.speedup for point in points]),
        }
        table = Table(show_header=False, title="aurora-rl")
        table.add_column()
        table.add_column(overflow="fold")
        for name, value in self._rows():
            value = value.ljust(40)  # so that the table keeps its width; a narrow terminal wraps it
            lines = [value, trends[name]] if trends.get(name) else [value]
            table.add_row(name, Text("\n".join(lines)))  # text of peers may look like Rich's markup
        return table

    def line(self) -> str:
        """Format the view for output that is not a terminal."""
        return " | ".join(f"{name} {value}" for name, value in self._rows())

    def news(self) -> str | None:
        """Return the line if more than the time has changed since this was asked: a server that idles logs nothing."""
        told = [(name, value) for name, value in self._rows() if not name.startswith("elapsed")]
        if told == self._printed:
            return None
        self._printed = told
        return self.line()


def _trial(history: RunHistory) -> str:
    """Return which weights are on trial, or how the last trial ended."""
    if history.on_trial is not None:
        return f"version {history.on_trial}"
    if not history.verdicts:
        return "–"
    last = history.verdicts[-1]
    return f"version {last.version} {'promoted' if last.promote else 'rolled back'}: {last.reason}"


def _time(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds.

    Example:
        >>> _time(3725.4)
        '1:02:05'
    """
    return str(datetime.timedelta(seconds=round(seconds)))


_BLOCKS = "▁▂▃▄▅▆▇█"


def trend(values: Sequence[float | None], width: int = 24) -> str:
    """Draw figures as blocks between the lowest and the highest, and name these two; a blank is a gap.

    Example:
        >>> trend([1.0, None, 1.5, 2.0])
        '▁ ▅█ 1.00–2.00'
    """
    count = min(len(values), width)
    parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(known) / len(known) if (known := [v for v in part if v is not None]) else None for part in parts]
    shown = [mean for mean in means if mean is not None]
    if len(shown) < 2:
        return ""
    low, high = min(shown), max(shown)
    step = (high - low) / (len(_BLOCKS) - 1) or 1.0
    blocks = "".join(" " if mean is None else _BLOCKS[round((mean - low) / step)] for mean in means)
    return f"{blocks} {low:.2f}–{high:.2f}"


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
