"""The history of a run, from its events: what the live page, the terminal and the report show."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from aurora_rl.telemetry.rates import MIN_BASELINE_ROUNDS, Rates

DRAFTED = {"tree": "tree", "chain": "chain", "ngrams": "n-grams", "plain": "plain", "baseline": "baseline window"}
"""What a round may have drafted, in words."""

_MAX_DOMAINS = 50
_NEWEST = 20  # more than the page's tables have rows
_OTHERS = "(others)"


def staleness(published: float | None, drafts: float | None) -> float | None:
    """Return how many versions were published after the one that drafts; None if either is not known.

    Example:
        >>> staleness(5, 3), staleness(None, 3)
        (2, None)
    """
    return None if published is None or drafts is None else max(published - drafts, 0)


def shares(drafted: Counter[str]) -> dict[str, float]:
    """Return the share of each kind of round, in the order of :data:`DRAFTED`; empty if there were none.

    Example:
        >>> shares(Counter(chain=1, tree=3))
        {'tree': 0.75, 'chain': 0.25}
    """
    return {name: drafted[name] / drafted.total() for name in DRAFTED if drafted[name]}


@dataclass(slots=True)
class Point:
    """The figures of a status.

    Attributes:
        time: Seconds since the epoch.
        requests: Completed requests.
        acceptance: Acceptance length over the last requests; None if none of their rounds was speculative.
        rates: Throughput and speedup over the last quarter of the requests.
        drafted: Rounds since the last point by what they drafted.
    """

    time: float
    requests: int
    acceptance: float | None
    rates: Rates
    drafted: Counter[str]


# Of events: the fields are those of `aurora_rl.telemetry.events`, with the completed requests at that time.


class Swap(NamedTuple):
    """New weights draft: the event "swap"."""

    time: float
    requests: int
    version: int
    ms: float


class GateDecision(NamedTuple):
    """A decision of the gate: the event "gate"."""

    time: float
    requests: int
    publish: bool
    difference: float
    interval: tuple[float, float]
    candidate: float
    serving: float
    version: int


class TrialVerdict(NamedTuple):
    """How the trial of new weights ended, by rounds or by engine. Figures are of the old and of the new weights."""

    time: float
    requests: int
    version: int
    promote: bool
    reason: str
    acceptance_length: tuple[float | None, float | None]
    tokens_per_second: tuple[float | None, float | None]


class WatchdogFault(NamedTuple):
    """A fault of the serving drafter: the event "watchdog"."""

    time: float
    requests: int
    version: int
    cause: str
    detail: str
    action: str


@dataclass(slots=True)
class LearnerFigures:
    """Latest figures of the learner's events; its state is "running", or the fault."""

    state: str = "not known yet"
    steps: int = 0
    seen: int = 0
    waiting: int = 0
    loss: float | None = None
    skipped: int = 0
    restarts: int = 0


@dataclass(slots=True)
class DomainFigures:
    """The completed requests of a domain.

    Attributes:
        first: Requests that had completed before its first.
    """

    first: int
    requests: int = 0
    tokens: int = 0
    speculative_tokens: int = 0
    speculative_rounds: int = 0

    @property
    def acceptance(self) -> float | None:
        """Acceptance length; None without speculative rounds."""
        return self.speculative_tokens / self.speculative_rounds if self.speculative_rounds else None


class RunHistory:
    """Follows the events of a run in bounded memory. One thread may follow while others read :meth:`as_json`.

    Args:
        most: Points, swaps and gate decisions that are kept of each; beyond that every second is dropped, except of
            the newest 20. The rounds that a dropped point counts go to the next point.

    Attributes:
        requests: Completed requests.
        version: Version of the weights that draft; None if it is not known yet.
        published: Version of the weights that the learner published last; None if it is not known yet.
        saved: Requests that learners of this run have learned from and saved.
        drops: Trajectories that were lost once they were sent, by reason.
        points: A point for each status. Where no request completed, the last point stands for all.
        drafted: Rounds of the last status by what they drafted.
        domains: Figures by domain; those of later domains than the first 50 are added up.
        marks: Number of completed requests at which something new begins, and what.

    Example:
        >>> history = RunHistory()
        >>> history.follow({"event": "swap", "time": 1.0, "requests": 8, "version": 1, "ms": 2.5})
        >>> history.version, history.swaps
        (1, [Swap(time=1.0, requests=8, version=1, ms=2.5)])
    """

    def __init__(self, most: int = 1000) -> None:
        self._most, self._lock = most, threading.Lock()
        self._traffic = 0  # requests of the traffic; those of clients have higher numbers
        self.requests = 0
        self.version: int | None = None
        self.published: int | None = None
        self.saved = 0
        self._seen: int | None = None  # trajectories seen when the running learner began or last saved
        self.drops: Counter[str] = Counter()
        self.points: list[Point] = []
        self.drafted: Counter[str] = Counter()
        self.swaps: list[Swap] = []
        self.gates: list[GateDecision] = []
        self._trials: dict[str, int] = {}  # versions on trial, by the event that a trial began with
        self.verdicts: list[TrialVerdict] = []
        self.faults: list[WatchdogFault] = []
        self.learner = LearnerFigures()
        self.domains: dict[str, DomainFigures] = {}
        self.marks: list[tuple[int, str]] = []

    def follow(self, event: dict[str, Any]) -> None:
        """Add an event of the server or of the learner, see :mod:`aurora_rl.telemetry.events`."""
        learner = self.learner
        with self._lock:
            match event["event"]:
                case "begin":
                    self._traffic = event["traffic"]
                    if event["unseen"] is not None:
                        self.marks.append((event["unseen"], "unseen templates"))
                case "request" | "requests":
                    self._count(event)
                case "status":
                    self._add_point(event)
                case "swap":
                    self.version = event["version"]
                    self._keep(self.swaps, Swap, event)
                case "gate":
                    decision = {"requests": self.requests, "interval": tuple(event["interval"])}
                    self._keep(self.gates, GateDecision, {**event, **decision})
                    self.published = event["version"]
                case "trial" | "engine_trial":
                    self._trials[event["event"]] = event["version"]
                case "verdict":
                    self._end_trial("trial", event, event["requests"])
                case "engine_verdict":
                    self._end_trial("engine_trial", event, self.requests)
                case "watchdog":
                    if event["version"] == self._trials.get("trial"):
                        del self._trials["trial"]
                    self._keep(self.faults, WatchdogFault, event)
                case "learner_ready":
                    self._seen = event["seen"]
                    self._trials.pop("engine_trial", None)  # a learner that starts anew goes on with none
                case "checkpoint":
                    self.published = event["version"]
                    self.saved += 0 if self._seen is None else event["seen"] - self._seen
                    self._seen = event["seen"]
                case "drops":
                    self.drops.update(event["reasons"])
                case "train":
                    learner.loss, learner.waiting = event["loss"], event["waiting"]
                    learner.steps, learner.seen = event["steps"], event["seen"]
                case "step_skipped":
                    learner.skipped = event["skipped"]
                case "learner_restarted":
                    learner.restarts = event["restarts"]
                    self.drops["learner_died"] += event["lost"]
                case "learner_died":
                    learner.state = event["reason"].removeprefix("the learner ")

    @property
    def on_trial(self) -> int | None:
        """Version that is on trial, in this server or else at a share of the engines; None if none is."""
        return self._trials.get("trial", self._trials.get("engine_trial"))

    def _end_trial(self, trial: str, event: Mapping[str, Any], requests: int) -> None:
        self._trials.pop(trial, None)
        names = ("acceptance_length", "tokens_per_second")
        figures = {name: (event[name]["old"], event[name]["new"]) if event[name] else (None, None) for name in names}
        self._keep(self.verdicts, TrialVerdict, {**event, **figures, "requests": requests})

    def _keep(self, items: list[Any], kind: type[Any], event: Mapping[str, Any]) -> None:
        items.append(kind(*(event[name] for name in kind._fields)))
        _thin(items, self._most)

    def _count(self, event: dict[str, Any]) -> None:
        name, requests = event.get("domain", ""), event.get("requests", 1)  # several requests come as sums
        if name not in self.domains and len(self.domains) >= _MAX_DOMAINS:
            name = _OTHERS
        domain = self.domains.setdefault(name, DomainFigures(self.requests))
        if event.get("request", self._traffic) >= self._traffic:  # a client's; the requests of the traffic come later
            self.marks = [(at + requests if at > self.requests else at, text) for at, text in self.marks]
        self.requests += requests
        domain.requests += requests
        domain.tokens += event["tokens"]
        domain.speculative_tokens += event["speculative_tokens"]
        domain.speculative_rounds += event["speculative_rounds"]

    def _add_point(self, event: dict[str, Any]) -> None:
        speed = event["tokens_per_second"]
        rates = Rates(speed["baseline"], speed["speculative"], event["baseline_rounds"], event["break_even"])
        self.drafted, points = Counter(event["drafted"]), self.points
        point = Point(event["time"], event["requests"], event["acceptance_length"], rates, self.drafted.copy())
        self.version, self.learner.state = event["version"], event["learner"]
        if len(points) > 1 and points[-2].requests == point.requests:
            point.drafted += points.pop().drafted
        points.append(point)
        if len(points) > self._most:
            for dropped, kept in zip(points[:-_NEWEST:2], points[1::2], strict=False):
                kept.drafted += dropped.drafted
        _thin(points, self._most)

    def unsaved(self, sent: int) -> int:
        """Return how many of the trajectories sent so far are in no training state, and not among :attr:`drops`."""
        return max(sent - self.saved - self.drops.total(), 0)

    def as_json(self) -> dict[str, Any]:
        """Return what the live page shows, as JSON values. Series are columns, which take less room than rows."""
        with self._lock:
            points, swaps, gates = self.points, self.swaps, self.gates
            return {
                "requests": self.requests,
                "version": self.version,
                "points": {
                    "time": [point.time for point in points],
                    "requests": [point.requests for point in points],
                    "acceptance": _rounded(point.acceptance for point in points),
                    "speedup": _rounded(point.rates.speedup for point in points),
                    "plain": _rounded(point.rates.baseline for point in points),
                    "speculative": _rounded(point.rates.speculative for point in points),
                    "baseline_rounds": [point.rates.baseline_rounds for point in points],
                },
                "min_baseline_rounds": MIN_BASELINE_ROUNDS,
                "drafted": {DRAFTED[name]: round(share, 4) for name, share in shares(self.drafted).items()},
                "swaps": _columns(swaps, Swap),
                "gates": _columns(gates, GateDecision),
                "on_trial": self.on_trial,
                "verdicts": _columns(self.verdicts, TrialVerdict),
                "faults": _columns(self.faults, WatchdogFault),
                "learner": asdict(self.learner),
            }


def _thin(items: list[Any], most: int) -> None:
    """Drop every second of too many, except of the newest."""
    if len(items) > most:
        del items[:-_NEWEST:2]


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 4) for value in values]


def _columns(items: list[Any], kind: type[Any]) -> dict[str, list[Any]]:
    return {name: [getattr(item, name) for item in items] for name in kind._fields}
