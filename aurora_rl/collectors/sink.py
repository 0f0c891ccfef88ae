"""The engine's end of the trajectory stream: never blocks serving, never fails it."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import Counter, deque
from typing import NamedTuple

import zmq
from tensordict import TensorDictBase

from aurora_rl.collectors.codec import DEFAULT_LIMITS, Limits, encode
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import ClientKeys
from aurora_rl.collectors.sockets import SocketThread, connect, engine_name, open_socket
from aurora_rl.tenants import MAX_DELETIONS
from aurora_rl.trajectories import size_of

logger = logging.getLogger(__name__)

TRAJECTORY, DELETION = "trajectory", "deletion"
# Messages that ZeroMQ may hold for a connected learner; they are lost with the connection, so there are few.
_SEND_HIGH_WATER = 4
_TURN_MS, _IDLE_S = 50, 1.0
_HEADER = 1 << 14  # bytes that a header has at most


class _Queued(NamedTuple):
    """A trajectory that waits, its tenant, the Unix time at which its request ended, and its seconds of decoding."""

    trajectory: TensorDictBase
    tenant: str | None
    captured: float
    seconds: float | None


class TrajectorySink:
    """Sends packed trajectories to a learner that may be late, slow, dead or restarted.

    Serving calls `extend`, which only appends to a queue; when that is full the oldest is dropped, because a learner
    wants the newest data. A thread owns the socket, encodes, and takes a trajectory from the queue only when a
    connected learner has room for it, so nothing piles up anywhere else. `extend` is also all that TorchRL's collectors
    ask of a ``replay_buffer=``.

    Args:
        address: Address of the learner's collector, such as ``tcp://127.0.0.1:5555``. The learner binds, the sink
            connects.
        handshake: Sent with every trajectory, since a learner may be replaced at any time.
        keys: Keys for CurveZMQ, if the learner has keys.
        capacity: Trajectories held while no learner takes them.
        max_bytes: Bytes of them.
        limits: Limits of a message. A trajectory beyond them, or beyond ``max_bytes`` by itself, is dropped.
        max_age: Seconds that a trajectory may be held; None knows no limit.
        name: Name of this engine at a learner without keys; the default is unique to this sink. A learner with keys
            takes the key's.

    Raises:
        ValueError: ``capacity`` is not positive.
        OSError: ``address`` is malformed. An absent learner is no error.
    """

    def __init__(
        self,
        address: str,
        *,
        handshake: Handshake,
        keys: ClientKeys | None = None,
        capacity: int = 256,
        max_bytes: int = 1 << 29,
        limits: Limits = DEFAULT_LIMITS,
        max_age: float | None = None,
        name: str | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 trajectory, got {capacity}")
        self._meta = {"handshake": handshake.to_meta(), "engine": name or engine_name(keys)}
        self._capacity, self._max_bytes, self._bytes = capacity, max_bytes, 0
        self._most = min(max_bytes, limits.max_bytes - _HEADER)
        self._max_age = math.inf if max_age is None else max_age
        self._queue: deque[_Queued] = deque()
        self._deletions: dict[str, float] = {}  # tenant -> Unix time of its latest deletion; latest last
        self._untold: dict[str, float] = {}  # those that the connected learner does not know
        self._told_connections = 0
        self._changed = threading.Condition()
        self._closed = False
        self._logged_refusal = False
        self.sent = 0
        """Trajectories handed to a connected learner; those on their way when it dies are lost with it."""
        self.drops = Counter(no_learner=0, slow_learner=0, not_encodable=0, too_large=0, expired=0)
        """Trajectories given up, by reason: ``not_encodable``, ``too_large``, ``expired``, or displaced by newer ones
        or left over at `close` while a learner was connected (``slow_learner``) or none was (``no_learner``)."""
        self.connected = False
        """Whether a learner is connected, as of the last turn of the thread, a second ago at most."""
        self._socket = open_socket(zmq.PUSH)
        self._socket.sndhwm = _SEND_HIGH_WATER
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # queue only for a learner that has completed its handshake
        self._socket.watch_peer()
        connect(self._socket, address, keys=keys)
        self._thread = SocketThread(self._socket, self._step, name="trajectory-sink")
        self._thread.start()

    @property
    def queued(self) -> int:
        """Trajectories waiting now."""
        return len(self._queue)

    def extend(self, trajectory: TensorDictBase, tenant: str | None = None, seconds: float | None = None) -> None:
        """Queue one packed trajectory of a request that has just ended, for a tenant, after ``seconds`` of decoding.

        Its tensors are encoded later, in another thread and without a copy, so do not write to them again.
        """
        with self._changed:
            if self._closed:
                self._drop(1)
                return
            size = size_of(trajectory)
            if size > self._most:
                self.drops["too_large"] += 1
                return
            while self._queue and (len(self._queue) >= self._capacity or self._bytes + size > self._max_bytes):
                self._take_oldest()
                self._drop(1)
            self._queue.append(_Queued(trajectory, tenant, time.time(), seconds))
            self._bytes += size
            self._changed.notify()

    def delete(self, tenant: str) -> int:
        """Drop what waits of a tenant, and tell the learner to drop what it has of requests that ended until now.

        A learner that connects later is told, too. Of deletions the latest 4,096 are told again.

        Returns:
            Trajectories that were dropped here.
        """
        with self._changed:
            self._deletions.pop(tenant, None)
            self._deletions[tenant] = self._untold[tenant] = time.time()
            while len(self._deletions) > MAX_DELETIONS:
                del self._deletions[next(iter(self._deletions))]
            kept = [queued for queued in self._queue if queued.tenant != tenant]
            dropped, self._queue = len(self._queue) - len(kept), deque(kept)
            self._bytes = sum(size_of(queued.trajectory) for queued in kept)
            self._changed.notify()
        return dropped

    def close(self, timeout: float = 1.0) -> None:
        """Send what is queued for at most ``timeout`` seconds, count the rest as dropped, and end. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.close(timeout)
        with self._changed:
            self._drop(len(self._queue))
            self._queue.clear()
            self._bytes = 0

    def _take_oldest(self) -> _Queued:
        queued = self._queue.popleft()
        self._bytes -= size_of(queued.trajectory)
        return queued

    def _drop(self, count: int) -> None:
        """Count trajectories that are given up; called with the lock held."""
        self.drops["slow_learner" if self.connected else "no_learner"] += count

    def _step(self) -> bool:
        with self._changed:
            if not self._queue and not self._untold and not self._closed:
                self._changed.wait(_IDLE_S)
            self.connected = self._socket.connected
            # It may be another learner, or the last one was lost.
            if self._told_connections != self._socket.connections:
                self._told_connections, self._untold = self._socket.connections, dict(self._deletions)
            while self._queue and self._queue[0].captured < time.time() - self._max_age:
                self._take_oldest()
                self.drops["expired"] += 1
            if not self._queue and not self._untold:
                return not self._closed
        if self._thread.expired:
            return False
        # Taken from the queue only now: a trajectory held back here would outlive newer ones.
        if self._socket.poll(_TURN_MS, zmq.POLLOUT):
            if self._untold and self.connected:  # a message sent before the monitor's word would be told twice
                self._send_deletion()
            else:
                self._send_oldest()
        return True

    def _send_deletion(self) -> None:
        with self._changed:
            tenant, before = next(iter(self._untold.items()))
        with contextlib.suppress(zmq.Again):  # the learner went away since the poll
            self._socket.send_multipart(
                encode(DELETION, {**self._meta, "tenant": tenant, "before": before}), zmq.NOBLOCK
            )
            with self._changed:
                if self._untold.get(tenant) == before:
                    del self._untold[tenant]

    def _send_oldest(self) -> None:
        with self._changed:
            if not self._queue:
                return
            queued = self._take_oldest()
        trajectory, tenant, captured, seconds = queued
        said = {"tenant": tenant, "captured": captured, "seconds": seconds}
        try:
            frames = encode(TRAJECTORY, {**self._meta, **said}, trajectory)
        except (ValueError, RuntimeError) as error:  # a RuntimeError is a failed copy from another device
            with self._changed:
                self.drops["not_encodable"] += 1
            if not self._logged_refusal:
                self._logged_refusal = True
                logger.warning("a trajectory cannot be sent and is dropped (later ones are only counted): %s", error)
            return
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:  # the learner went away since the poll
            with self._changed:
                if tenant is not None and captured <= self._deletions.get(tenant, 0.0):
                    return
                if len(self._queue) < self._capacity:
                    self._queue.appendleft(queued)
                    self._bytes += size_of(trajectory)
                else:
                    self._drop(1)
        else:
            self.connected = True  # the monitor's word may come later
            self.sent += 1
