"""The server of a run whose engine is SGLang: asks for completions, watches the plugin, keeps the figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from typing_extensions import override

from aurora_rl.envs import Completion, Request
from aurora_rl.envs.sglang.client import SGLangClient, SGLangCompletion, SGLangError
from aurora_rl.envs.sglang.control import ControlError
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.rates import Round
from aurora_rl.telemetry.stats import Figures

_TURN_S = 0.25
_WATCH_S = 1.0


class SGLangServer(Figures):
    """Keeps an engine's slots filled with requests. Rounds, records and swaps happen in the engine itself.

    Args:
        engine: to serve by.
        attach: attaches the learner to it; called now, and again when the server was restarted.
        requests: called for the next request; None where there is none now.
        slots: requests in flight.
        depth: of the trees that the engine drafts.
        stop_tokens: ids that end a completion.
        log: where requests and swaps are written.
        note: called with each completion; returns its domain.
        on_refused: called with each request that the engine did not answer, and the reason.

    Attributes:
        status: the plugin's, as last heard.
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
    ) -> None:
        super().__init__(0)
        self.engine, self._requests, self._slots, self._depth = engine, requests, slots, depth
        self._stop_tokens, self._log, self._note, self._on_refused = tuple(stop_tokens), log, note, on_refused
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="requests")
        self._flying: dict[Future[SGLangCompletion], Request] = {}
        self._last_completion = time.perf_counter()
        self._next_watch = 0.0
        self._attach, self._told_swaps, self._reachable = attach, 0, True
        self.status = attach()
        log.write("attached", status=self.status)

    @property
    @override
    def depth(self) -> int:
        return self._depth

    @property
    @override
    def dropped(self) -> int:
        return self.status.get("dropped", 0)

    def step(self) -> bool:
        """Ask for what there is room for and take what is finished. False where nothing is in flight."""
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
        now, count = time.perf_counter(), len(self.finished)
        # Of a remote engine only what is answered is seen: between two answers all slots together made this one.
        self.rounds.append(Round(True, occupied, len(completion.tokens), now - self._last_completion, count))
        self._last_completion = now
        self.finish(domain, len(completion.tokens), drafted, completion.rounds)
        self._log.write(
            "request",
            request=completion.request.id,
            domain=domain,
            tokens=len(completion.tokens),
            terminated=completion.terminated,
            speculative_tokens=drafted,
            speculative_rounds=completion.rounds,
            accepted=completion.accepted,
            versions=completion.versions,
            depth=self._depth,
            coverage=None,
        )

    def watch(self) -> None:
        """Hear the plugin's status and log new swaps; attach again to a server that was restarted."""
        try:
            status = self.engine.status()
            if not status["attached"]:
                status, self._told_swaps = self._attach(), 0
                self._log.write("attached", status=status)
        except (ControlError, SGLangError) as error:
            if self._reachable:
                self._log.write("unreachable", reason=str(error))
            self._reachable = False
            return
        finally:
            self._next_watch = time.monotonic() + _WATCH_S
        self.status, self._reachable = status, True
        new, self._told_swaps = status["swaps"] - self._told_swaps, status["swaps"]
        for milliseconds in status["swap_ms"][-new:] if new > 0 else []:
            self.swap_ms.append(milliseconds)
            self._log.write("swap", version=self.status["version"], ms=milliseconds, requests=len(self.finished))
        if self.status["version"] != self.version:
            self.versions.append(self.status["version"])

    def close(self) -> None:
        """Wait for what is in flight."""
        self._pool.shutdown(cancel_futures=True)
