"""Requests of concurrent clients: each gets a stream of what rounds add to it, in an event loop elsewhere."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from aurora_rl.envs import Completion, Request, SamplingParams
from aurora_rl.envs.request import TokenLogprobs
from aurora_rl.serving.request_times import RequestTimes, Wait
from aurora_rl.serving.requests import RequestSource
from aurora_rl.serving.server import Deleted, InferenceServer


class QueueFullError(RuntimeError):
    """More requests would wait than may.

    Args:
        waiting: Requests that wait.
        most: Requests that may wait.
    """

    def __init__(self, waiting: int, most: int) -> None:
        super().__init__(f"{waiting} requests wait already, and http.max_waiting allows {most}")


class UnavailableError(RuntimeError):
    """No requests are taken."""


class ShuttingDownError(UnavailableError):
    """The server ends in good order: it completes what it has, for a while, and takes nothing new."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class EngineDeadError(UnavailableError):
    """A fault has ended the rounds; nothing is served any more."""


class RefusedError(ValueError):
    """The engine cannot serve the request; the message says why."""


@dataclass(slots=True)
class Update:
    """Tokens that one round added to one request.

    Attributes:
        tokens: New tokens.
        logprobs: Their log-probabilities, where the request asked for them.
        completion: The whole completion, in the last update; None before.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    completion: Completion | None = None


@dataclass(frozen=True)
class Job:
    """One completion that a client wants: a :class:`~aurora_rl.envs.Request` that has no number yet."""

    prompt: Tensor
    sampling_params: SamplingParams
    speculative: bool = True
    learn: bool = True
    counted: bool = True
    cache_salt: str | None = None
    tenant: str | None = None


@dataclass(slots=True, eq=False)
class _Stream:
    """The client's end of a request: its place among the jobs, their queue, and the event loop that reads it."""

    request: Request
    index: int
    queue: asyncio.Queue[tuple[_Stream, Update | Exception] | None]
    loop: asyncio.AbstractEventLoop
    times: RequestTimes


@dataclass(slots=True, eq=False)
class _Deletion:
    """A tenant whose data is to be deleted once these requests have ended, and the answer to who asked for it."""

    tenant: str
    requests: set[int]
    answer: Future[Deleted] = field(default_factory=Future)


class AsyncEngine:
    """The requests of concurrent clients, for a server that another thread drives round by round.

    An environment takes its requests from this object, and reports to it: make it first, then the server, then
    :meth:`attach` it. Then one thread calls :meth:`step` again and again, and clients in the event loops of other
    threads :meth:`generate`. Waiting requests are served first come, first served.

    Args:
        max_waiting: Requests that may wait for a slot.
        workload: Requests that are served while no client's waits; None for none.
        first_id: Number of the first client's request; the workload's are below it.

    Attributes:
        observe: Called with what a client has waited for and how many seconds, in the thread of its event loop.
        cancelled: Requests that were given up: the client left, or its time ran out.
        delivered: Tokens that rounds have delivered, to clients and to the workload.
    """

    def __init__(self, *, max_waiting: int, workload: RequestSource | None = None, first_id: int = 0) -> None:
        self.observe: Callable[[Wait, float], None] = lambda wait, seconds: None
        self.cancelled = self.delivered = 0
        self._max_waiting, self._workload = max_waiting, workload
        self._first_id, self._ids = first_id, itertools.count(first_id)
        self._lock = threading.Lock()
        self._waiting: deque[Request] = deque()
        self._cancelled: set[int] = set()
        self._streams: dict[int, _Stream] = {}
        self._deletions: list[_Deletion] = []
        self._updates: list[tuple[_Stream, Update | Exception]] = []  # from the round that runs
        self._arrived = threading.Event()
        self._closed, self._fault = False, ""  # whether no more requests are taken, and the fault that ended the rounds
        self._server: InferenceServer | None = None

    # ---- called by clients ------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Clients' requests that wait for a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in slots, the workload's included."""
        return self._server.env.num_active if self._server is not None else 0

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._server is not None and not self._closed

    def check_alive(self) -> None:
        """Raise UnavailableError, with the reason, if no requests are taken."""
        if not self.alive:
            raise self._unavailable()

    def _unavailable(self) -> UnavailableError:
        if self._closed and not self._fault:
            return ShuttingDownError()
        return EngineDeadError(self._fault or "the engine does not run; see the server's log")

    def counts(self) -> dict[str, float]:
        """Return what changes from moment to moment, by the names of :data:`aurora_rl.telemetry.prometheus.METRICS`."""
        server = self._server
        return {
            "num_requests_running": self.num_running,
            "num_requests_waiting": self.num_waiting,
            "requests_cancelled_total": self.cancelled,
            "prefix_cache_queries_total": 0 if server is None else server.prefix_cache_queries,
            "prefix_cache_hits_total": 0 if server is None else server.prefix_cache_hits,
        }

    async def generate(
        self, jobs: Sequence[Job], deadline: float | None = None
    ) -> AsyncGenerator[tuple[int, Update], None]:
        """Complete prompts, and yield what each round added to one, with its index. Closing it cancels what is open.

        Args:
            jobs: What to generate; all are taken, or none.
            deadline: Time of the event loop's clock by which all are to be complete.

        Raises:
            TimeoutError: The deadline has passed.
            QueueFullError: More requests would wait than ``max_waiting``.
            RefusedError: The engine cannot serve one of the requests.
            UnavailableError: The server is shutting down, or a fault has ended the rounds.
        """
        queue: asyncio.Queue[tuple[_Stream, Update | Exception] | None] = asyncio.Queue()  # None: the deadline passed
        loop, left = asyncio.get_running_loop(), []
        for index, job in enumerate(jobs):
            request = Request(next(self._ids), **vars(job))
            left.append(_Stream(request, index, queue, loop, RequestTimes(self.observe if job.counted else _unseen)))
        with self._lock:
            self.check_alive()
            if len(self._waiting) + len(jobs) > self._max_waiting:
                raise QueueFullError(len(self._waiting), self._max_waiting)
            for stream in left:
                self._streams[stream.request.id] = stream
                self._waiting.append(stream.request)
        self._arrived.set()
        # One timer: a timeout around each wait would cost more than all else that is done here with an update.
        timer = None if deadline is None else loop.call_at(deadline, queue.put_nowait, None)
        try:
            while left:
                if (item := await queue.get()) is None:
                    raise TimeoutError
                stream, update = item
                if isinstance(update, Exception):
                    left.remove(stream)
                    raise update
                if update.tokens:
                    stream.times.delivered(len(update.tokens))
                if update.completion is not None:
                    left.remove(stream)
                    stream.times.completed()
                yield stream.index, update
        finally:  # nothing is awaited here, so that what is cancelled ends at once
            if timer is not None:
                timer.cancel()
            for stream in left:
                self._cancel(stream)

    async def delete(self, tenant: str) -> Deleted:
        """Drop what is kept of a tenant's requests. Those in flight are completed first, and are not captured.

        Raises:
            UnavailableError: The server is shutting down, or a fault has ended the rounds.
        """
        with self._lock:
            self.check_alive()
            requests = [each.request for each in list(self._streams.values()) if each.request.tenant == tenant]
            for request in requests:
                request.learn = False
            deletion = _Deletion(tenant, {request.id for request in requests})
            self._deletions.append(deletion)
        self._arrived.set()
        return await asyncio.wrap_future(deletion.answer)

    def _cancel(self, stream: _Stream) -> None:
        request = stream.request
        with self._lock:
            self._streams.pop(request.id, None)
            self._cancelled.add(request.id)
            self.cancelled += request.counted
            waiting = any(each is request for each in self._waiting)
        stream.times.abandoned(waiting=waiting)
        self._arrived.set()

    # ---- called by the thread that drives the rounds ----------------------------------------------------------------

    def attach(self, server: InferenceServer) -> None:
        """Take requests from now on, for the server whose environment has this object as its source."""
        server.env.on_tokens, self._server = self._tokens, server

    def step(self) -> bool:
        """Serve one round. False if there was nothing to decode."""
        assert self._server is not None, "call attach first"
        self._drop_cancelled(self._server)
        self._delete(self._server)
        worked = self._server.step()
        self._deliver()
        return worked

    def wait(self, timeout: float) -> None:
        """Wait until a client comes or goes, at most ``timeout`` seconds."""
        if self._arrived.wait(timeout):
            self._arrived.clear()

    @property
    def num_open(self) -> int:
        """Clients' requests that are not complete, and deletions that are not done."""
        return len(self._streams) + len(self._deletions)

    def close(self) -> None:
        """Take no more requests, the workload's included, as the server is shutting down; those in flight go on."""
        with self._lock:
            self._closed = True

    def end(self, fault: str = "") -> None:
        """Take no more requests, and tell those in flight why.

        Args:
            fault: What ended the rounds; empty if the server is shutting down.
        """
        with self._lock:  # nobody is added after this
            self._closed, self._fault = True, self._fault or fault
            self._updates += [(stream, self._unavailable()) for stream in self._streams.values()]
            self._streams.clear()
            deletions, self._deletions = self._deletions, []
        for deletion in deletions:
            if deletion.answer.set_running_or_notify_cancel():
                deletion.answer.set_exception(self._unavailable())
        self._deliver()

    def __call__(self) -> Request | None:
        """Return the next request for a free slot; None if none waits."""
        with self._lock:
            if self._waiting:
                request = self._waiting.popleft()
                if (stream := self._streams.get(request.id)) is not None:
                    stream.times.scheduled = time.monotonic()
                return request
        return None if self._workload is None or self._closed else self._workload()

    def completed(self, completion: Completion) -> str:
        """Hand a completion to its client or to the workload, and return its domain."""
        stream = self._streams.pop(completion.request.id, None)
        if stream is not None:
            self._updates.append((stream, Update([], None, completion)))
            return ""
        if self._workload is None or completion.request.id >= self._first_id:
            return ""  # its client left in this very round
        return self._workload.completed(completion)

    def refused(self, request: Request, reason: str) -> None:
        """Tell the client or the workload that a request cannot be served."""
        if (stream := self._streams.pop(request.id, None)) is not None:
            self._updates.append((stream, RefusedError(reason.removeprefix(f"request {request.id}: "))))
        elif self._workload is not None and request.id < self._first_id:
            self._workload.refused(request, reason)

    def _tokens(self, request: Request, tokens: list[int], logprobs: list[TokenLogprobs] | None) -> None:
        self.delivered += len(tokens)
        if (stream := self._streams.get(request.id)) is not None:
            self._updates.append((stream, Update(tokens, logprobs)))

    def _drop_cancelled(self, server: InferenceServer) -> None:
        if not self._cancelled:
            return
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            self._waiting = deque(request for request in self._waiting if request.id not in cancelled)
        for request in cancelled:
            server.cancel(request)

    def _delete(self, server: InferenceServer) -> None:
        """Do the deletions whose requests have ended."""
        with self._lock:
            due = [each for each in self._deletions if not each.requests & self._streams.keys()]
        for deletion in due:
            deleted = server.delete(deletion.tenant)
            with self._lock:  # not earlier: one that fails ends the rounds, and is answered by that
                self._deletions.remove(deletion)
            if deletion.answer.set_running_or_notify_cancel():
                deletion.answer.set_result(deleted)

    def _deliver(self) -> None:
        """Wake each event loop once for all that a round added."""
        updates, self._updates = self._updates, []
        for loop in {stream.loop for stream, _ in updates}:
            updates_of_loop = [(stream, update) for stream, update in updates if stream.loop is loop]
            try:
                loop.call_soon_threadsafe(_put, updates_of_loop)
            except RuntimeError:  # the loop is closed, and nobody reads
                continue


def _put(updates: list[tuple[_Stream, Update | Exception]]) -> None:
    for stream, update in updates:
        stream.queue.put_nowait((stream, update))


def _unseen(wait: Wait, seconds: float) -> None:
    """Times of a request that is not counted."""
