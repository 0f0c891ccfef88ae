"""The server of a run whose engine is another process: watches the plugin, keeps the statistics, may send requests."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import fields
from pathlib import Path
from typing import Any

from typing_extensions import override

from aurora_rl.envs import Completion, Request
from aurora_rl.envs.remote.client import EngineClient, EngineCompletion, EngineError
from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.envs.remote.recorded_totals import RecordedTotals
from aurora_rl.serving.server import note_request
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.rates import Round
from aurora_rl.telemetry.stats import Stats

logger = logging.getLogger(__name__)

_TURN_S = 0.25
_WATCH_S = 1.0
_SUMS = tuple(each.name for each in fields(RecordedTotals) if each.name != "accepted")


class AttachedServer:
    """An engine that a learner is attached to. Its clients are others; what it served them, the plugin counts.

    Args:
        client: Client of the engine.
        attach: Attaches the learner to the engine; called now, and again when the engine was restarted.
        log: Log of requests and swaps.
        published: Returns the folder of the drafter that the learner published last; None if that is not known.

    Attributes:
        stats: Statistics of the run so far.
        status: Status of the plugin, as last heard.
        detached: Whether somebody else detached the learner, which is not attached again then.
    """

    def __init__(
        self,
        client: EngineClient,
        attach: Callable[[], dict[str, Any]],
        *,
        log: MetricsLog,
        published: Callable[[], Path | None] = lambda: None,
    ) -> None:
        self.stats, self.client, self.detached = Stats(0), client, False
        self._attach, self._log, self._published = attach, log, published
        self._next_watch, self._unreachable = 0.0, ""
        self._drops_before, self._sent_before = Counter[str](), 0  # counts of servers before this one
        self.status: dict[str, Any] = {}
        self._begin()

    def _begin(self) -> None:
        """Attach the learner; the plugin's counts begin at 0."""
        last, self.status = self.status, self._attach()
        self._drops_before.update(last.get("drops", {}))
        self._sent_before += last.get("sent", 0)
        self._told_swaps, self._told_faults = 0, Counter[int]()  # faults by replica
        self._served, self._accepted = Counter[str](), Counter[int]()
        self._log.write("attached", status=self.status)

    @property
    def depth(self) -> int:
        """Depth of the trees that the engine drafts."""
        return self.status["depth"]

    @property
    def num_slots(self) -> int:
        """Requests that the engine decodes at the same time."""
        return self.status["slots"]

    @property
    def drops(self) -> Counter[str]:
        """Trajectories that no learner took, by reason; see :attr:`TrajectorySink.drops`."""
        return self._drops_before + Counter(self.status.get("drops", {}))

    @property
    def sent(self) -> int:
        """Trajectories handed to a learner."""
        return self._sent_before + self.status.get("sent", 0)

    @property
    def queued(self) -> int:
        """Trajectories that wait to be sent."""
        return self.status.get("queued", 0)

    @property
    def refused(self) -> str | None:
        """Why the learner refuses this engine, or why nothing is learned from it now; None if neither."""
        if self.detached:
            return f"somebody else detached the learner from {self.client.engine}"
        return self._unreachable or self.status.get("refused") or self.status.get("error") or None

    def step(self) -> bool:
        """Wait for a moment, and watch. Return False once somebody else has detached the learner."""
        time.sleep(_TURN_S)
        if time.monotonic() >= self._next_watch:
            self.watch()
        return not self.detached

    def watch(self) -> None:
        """Ask for the plugin's status, log swaps and requests; attach again to a server that was restarted."""
        self._next_watch = time.monotonic() + _WATCH_S
        try:
            status = self.client.status()
            if status["session"] == "":  # a new process
                self._begin()
                status = self.status
        except (PluginError, EngineError) as error:
            if not self._unreachable:
                self._log.write("unreachable", reason=str(error))
            self._unreachable = str(error)
            return
        self._unreachable = ""
        if status["attached"] and status["session"] == self.status["session"]:
            self._follow(status)
        elif not self.detached:
            self.detached = True
            logger.warning("%s; %s serves on, and this run learns no more", self.refused, self.client.engine)

    def _follow(self, status: dict[str, Any]) -> None:
        self.status = status
        new, self._told_swaps = status["swaps"] - self._told_swaps, status["swaps"]
        for milliseconds in status["swap_ms"][-new:] if new > 0 else []:
            self.stats.swap_ms.append(milliseconds)
            self._log.write("swap", version=status["version"], ms=milliseconds, requests=len(self.stats.finished))
        if status["version"] != self.stats.version:
            self.stats.versions.append(status["version"])
        for fault in status["faults"]:
            if fault["number"] > self._told_faults[replica := fault.get("replica", 0)]:
                self._told_faults[replica] = fault["number"]
                told = {name: fault[name] for name in ("version", "cause", "detail", "action")}
                self._log.write("watchdog", **told, requests=len(self.stats.finished))
        self._count(status["served"])

    def _count(self, served: dict[str, Any]) -> None:
        """Count the requests that the plugin has recorded since the last status; ``served`` are its sums."""
        sums = Counter({name: served[name] for name in _SUMS})
        accepted = Counter({int(count): rounds for count, rounds in served["accepted"].items()})
        new, by_count = sums - self._served, accepted - self._accepted
        if new["requests"]:
            self._served, self._accepted = sums, accepted
            self.stats.finish("", new["tokens"], new["speculative_tokens"], new["speculative_rounds"], new["requests"])
            self.stats.drafted["tree" if self.status["width"] > 1 else "chain"] += new["speculative_rounds"]
            self._log.write("requests", **{name: new[name] for name in _SUMS}, accepted=dict(sorted(by_count.items())))

    def save_drafter(self, folder: str | os.PathLike[str]) -> None:
        """Copy the drafter that the learner published last, if there is one."""
        if (published := self._published()) is not None:
            shutil.copytree(published, folder, dirs_exist_ok=True)

    def close(self) -> None:
        """Detach so that the records are sent, and end the engine if it is ours."""
        self.watch()
        if not self.detached and not self._unreachable:
            with contextlib.suppress(PluginError):  # it is gone already
                last = self.client.detach()
                if last["session"] == self.status["session"]:
                    self._follow(last)  # it has what was recorded at the last moment
        self.client.close()


class DrivenServer(AttachedServer):
    """The same, with requests of ours alone: keeps the engine's slots filled, and counts its own answers.

    The other arguments are those of the base class.

    Args:
        requests: Called for the next request; None if there is none now.
        num_slots: Requests in flight.
        stop_tokens: Token ids that end a completion.
        note: Called with each completion; returns its domain.
        on_refused: Called with each request that the engine did not answer, and the reason.
    """

    def __init__(
        self,
        client: EngineClient,
        attach: Callable[[], dict[str, Any]],
        requests: Callable[[], Request | None],
        *,
        num_slots: int,
        stop_tokens: Sequence[int],
        log: MetricsLog,
        note: Callable[[Completion], str],
        on_refused: Callable[[Request, str], None],
        published: Callable[[], Path | None] = lambda: None,
    ) -> None:
        super().__init__(client, attach, log=log, published=published)
        self._requests, self._num_slots = requests, num_slots
        self._stop_tokens, self._note, self._on_refused = tuple(stop_tokens), note, on_refused
        self._pool = ThreadPoolExecutor(num_slots, thread_name_prefix="requests")
        self._flying: dict[Future[EngineCompletion], Request] = {}
        self._last_completion = time.perf_counter()

    @override
    def step(self) -> bool:
        """Send requests to free slots and take finished ones. Return False if nothing is in flight."""
        while len(self._flying) < self._num_slots and (request := self._requests()) is not None:
            self._flying[self._pool.submit(self.client.generate, request, stop_tokens=self._stop_tokens)] = request
        if not self._flying:
            self.watch()
            return False
        done, _ = wait(self._flying, timeout=_TURN_S, return_when=FIRST_COMPLETED)
        for each in done:
            occupied = len(self._flying)
            request = self._flying.pop(each)
            try:
                self._completed(each.result(), occupied)
            except EngineError as error:
                self._on_refused(request, str(error))
        if time.monotonic() >= self._next_watch:
            self.watch()
        return True

    def _completed(self, completion: EngineCompletion, occupied: int) -> None:
        ended = Completion(completion.request, completion.tokens, completion.terminated)
        domain = self._note(ended)
        drafted = sum((count + 1) * rounds for count, rounds in completion.accepted.items())
        now, count = time.perf_counter(), len(self.stats.finished)
        # A remote engine shows only what is answered: between two answers all slots together made this one.
        self.stats.rounds.append(Round(True, occupied, len(completion.tokens), now - self._last_completion, count))
        self._last_completion = now
        note_request(
            ended,
            domain,
            self.stats,
            self._log,
            speculative_tokens=drafted,
            speculative_rounds=completion.rounds,
            drafted_tokens=completion.drafted,
            accepted=completion.accepted,
            versions=completion.versions,
            depth=self.depth,
            coverage=None,
        )

    @override
    def _count(self, served: dict[str, Any]) -> None:
        """Leave the plugin's sums alone: answers are counted as they come, also those that are not recorded."""

    @override
    def close(self) -> None:
        """Wait for the requests in flight, and end as the base class does."""
        self._pool.shutdown(cancel_futures=True)
        super().close()
