"""The server of a run whose engine is SGLang: requests completions, watches the plugin, keeps the statistics."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from aurora_rl.envs import Completion, Request
from aurora_rl.envs.sglang.client import SGLangClient, SGLangCompletion, SGLangError
from aurora_rl.envs.sglang.plugin_server import PluginError
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.rates import Round
from aurora_rl.telemetry.stats import Stats

_TURN_S = 0.25
_WATCH_S = 1.0


class SGLangServer:
    """Keeps an engine's slots filled with requests. Rounds, records and swaps happen in the engine itself.

    Args:
        engine: Client of the engine.
        attach: Attaches the learner to the engine; called now, and again when the engine was restarted.
        requests: Called for the next request; None if there is none now.
        slots: Requests in flight.
        depth: Depth of the trees that the engine drafts.
        stop_tokens: Token ids that end a completion.
        log: Log of requests and swaps.
        note: Called with each completion; returns its domain.
        on_refused: Called with each request that the engine did not answer, and the reason.
        published: Folder where the learner saves the drafter that it published last; None if that is not known.

    Attributes:
        stats: Statistics of the run so far.
        status: Status of the plugin, as last heard.
    """

    def __init__(
        self,
        engine: SGLangClient,
        attach: Callable[[], dict[str, Any]],
        requests: Callable[[], Request | None],
        *,
        slots: int,
        depth: int,
        stop_tokens: Sequence[int],
        log: MetricsLog,
        note: Callable[[Completion], str],
        on_refused: Callable[[Request, str], None],
        published: Path | None = None,
    ) -> None:
        self.stats, self.engine, self.depth = Stats(0), engine, depth
        self._requests, self._slots, self._published = requests, slots, published
        self._stop_tokens, self._log, self._note, self._on_refused = tuple(stop_tokens), log, note, on_refused
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="requests")
        self._flying: dict[Future[SGLangCompletion], Request] = {}
        self._last_completion = time.perf_counter()
        self._next_watch = 0.0
        self._attach, self._told_swaps, self._reachable = attach, 0, True
        self.status = attach()
        log.write("attached", status=self.status)

    @property
    def dropped(self) -> int:
        """Trajectories that no learner took."""
        return self.status.get("dropped", 0)

    @property
    def queued(self) -> int:
        """Trajectories that wait to be sent."""
        return self.status.get("queued", 0)

    @property
    def refused(self) -> str | None:
        """Why the learner refuses this engine, or why it is not recorded; None if neither."""
        return self.status.get("refused") or self.status.get("error") or None

    def step(self) -> bool:
        """Send requests to free slots and take finished ones. Return False if nothing is in flight."""
        while len(self._flying) < self._slots and (request := self._requests()) is not None:
            self._flying[self._pool.submit(self.engine.generate, request, stop_tokens=self._stop_tokens)] = request
        if not self._flying:
            self.watch()
            return False
        done, _ = wait(self._flying, timeout=_TURN_S, return_when=FIRST_COMPLETED)
        for each in done:
            occupied = len(self._flying)
            request = self._flying.pop(each)
            try:
                self._completed(each.result(), occupied)
            except SGLangError as error:
                self._on_refused(request, str(error))
        if time.monotonic() >= self._next_watch:
            self.watch()
        return True

    def _completed(self, completion: SGLangCompletion, occupied: int) -> None:
        domain = self._note(Completion(completion.request, completion.tokens, completion.terminated))
        drafted = sum((count + 1) * rounds for count, rounds in completion.accepted.items())
        now, count = time.perf_counter(), len(self.stats.finished)
        # Of a remote engine only what is answered is seen: between two answers all slots together made this one.
        self.stats.rounds.append(Round(True, occupied, len(completion.tokens), now - self._last_completion, count))
        self._last_completion = now
        self.stats.finish(domain, len(completion.tokens), drafted, completion.rounds)
        self._log.write(
            "request",
            request=completion.request.id,
            domain=domain,
            prompt_tokens=len(completion.request.prompt),
            tokens=len(completion.tokens),
            terminated=completion.terminated,
            speculative_tokens=drafted,
            speculative_rounds=completion.rounds,
            drafted_tokens=completion.drafted,
            accepted=completion.accepted,
            versions=completion.versions,
            depth=self.depth,
            coverage=None,
        )

    def watch(self) -> None:
        """Ask for the plugin's status and log new swaps; attach again to a server that was restarted."""
        try:
            status = self.engine.status()
            if not status["attached"]:
                status, self._told_swaps = self._attach(), 0
                self._log.write("attached", status=status)
        except (PluginError, SGLangError) as error:
            if self._reachable:
                self._log.write("unreachable", reason=str(error))
            self._reachable = False
            return
        finally:
            self._next_watch = time.monotonic() + _WATCH_S
        self.status, self._reachable = status, True
        new, self._told_swaps = status["swaps"] - self._told_swaps, status["swaps"]
        for milliseconds in status["swap_ms"][-new:] if new > 0 else []:
            self.stats.swap_ms.append(milliseconds)
            self._log.write("swap", version=self.status["version"], ms=milliseconds, requests=len(self.stats.finished))
        if self.status["version"] != self.stats.version:
            self.stats.versions.append(self.status["version"])

    def save_drafter(self, folder: str | os.PathLike[str]) -> None:
        """Copy the drafter that the learner published last, if there is one."""
        if self._published is not None and self._published.is_dir():
            shutil.copytree(self._published, folder, dirs_exist_ok=True)

    def close(self) -> None:
        """Wait for the requests in flight, detach so that the records are sent, and end the engine if it is ours."""
        self._pool.shutdown(cancel_futures=True)
        self.watch()
        with contextlib.suppress(PluginError):  # it is gone already
            self.engine.detach()
        self.engine.close()
