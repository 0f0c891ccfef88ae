"""Versioned drafter weights from the learner to the engines.

The engine speaks first and repeats itself; so either side may start, vanish or restart at any time:

- engine (DEALER, connects): ``serving`` {version, checksum, received, handshake} when connected, after each change and
  as heartbeat; ``ack`` {version, checksum, swap_ms} of what was loaded, or ``nack`` {version, reason}.
- learner (ROUTER, binds): ``accepted`` {}, or ``refused`` {reason} where the handshake differs; ``weights`` {version,
  checksum} and tensors, if newer than what the engine serves.

The learner keeps the newest weights only. It sends an engine no more before the last ones have arrived there (its
``received`` tells). So a slow engine skips versions, and no queue grows. Over one connection ZeroMQ loses nothing. A
new connection has a new identity, and for it everything starts afresh.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import zmq
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aurora_rl.collectors.codec import (
    DEFAULT_LIMITS,
    Buffer,
    CodecError,
    Key,
    Limits,
    Message,
    checksum,
    decode,
    encode,
    leaves,
)
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.sockets import SocketThread, bind, connect, open_socket

logger = logging.getLogger(__name__)

_TURN_MS = 20
_CONTROL = Limits(max_bytes=1 << 16, max_leaves=0, max_header_bytes=1 << 16)
_MAX_ENGINES = 256  # the least recently seen is forgotten; one that still lives introduces itself again within a second
_MAX_REPLIES = 64
_MAX_NAME = 256
_REMEMBERED_CHECKSUMS = 64


@dataclass(slots=True)
class EngineStatus:
    """What the learner knows of one engine; times are `time.monotonic` seconds.

    `acknowledged` is the newest version whose checksum, after loading, was the published one. `rejected` is the last
    version that was refused or loaded wrong, with the reason. Its version is None if the message could not be read.
    `ahead`: it serves a version newer than any published here, from an earlier learner, and ignores the published ones.
    """

    identity: bytes
    serving: int
    last_seen: float
    acknowledged: int | None = None
    swap_ms: float | None = None
    rejected: tuple[int | None, str] | None = None
    offered: int | None = None
    in_flight: bool = False
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class _Published:
    version: int
    frames: list[Buffer]


class WeightPublisher:
    """The learner's side: offers the newest weights to every engine, in a thread of its own.

    Args:
        address: Address to bind; ``tcp://127.0.0.1:*`` takes a free port, see `address`.
        handshake: What an engine's handshake must equal before it gets weights.
        limits: Limits of a message, the same on both sides: weights that engines would refuse are refused here.

    Raises:
        OSError: The address is taken or cannot be bound.
    """

    def __init__(self, address: str, *, handshake: Handshake, limits: Limits = DEFAULT_LIMITS) -> None:
        self.error: str | None = None
        """How the latest refused engine differed."""
        self.rejected = 0  # malformed messages dropped
        self._handshake, self._limits = handshake, limits
        self._newest: _Published | None = None
        self._engines: OrderedDict[str, EngineStatus] = OrderedDict()
        self._changed = threading.Condition()
        self._checksums: OrderedDict[int, str] = OrderedDict()  # an engine may acknowledge what is no longer the newest
        self._socket = open_socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # report an engine that is gone instead of dropping silently
        self._socket.maxmsgsize = _CONTROL.max_bytes
        self.address = bind(self._socket, address, limits=_CONTROL)
        self._thread = SocketThread(self._socket, self._step, name="weight-publisher")
        self._thread.start()

    @property
    def engines(self) -> dict[str, EngineStatus]:
        """A copy of what is known, by engine name."""
        with self._changed:
            return {name: replace(status) for name, status in self._engines.items()}

    @property
    def next_version(self) -> int:
        """Above everything published here and served anywhere. A learner that starts afresh must continue from here."""
        with self._changed:
            published = self._newest.version if self._newest else 0
            return 1 + max([published, *(status.serving for status in self._engines.values())])

    def publish(self, version: int, tensors: TensorDictBase | Mapping[str | Key, Tensor]) -> str:
        """Make these the newest weights, and return the checksum that acknowledgements must repeat.

        They are copied and hashed in the calling thread, and sent in another.

        Args:
            version: Version, larger than any before; an engine that serves it or a later one ignores the weights.
            tensors: Tensors on any device; they may be trained on as soon as this returns.

        Raises:
            ValueError: ``version`` is not larger than the last one, or the weights exceed ``limits``.
            CodecError: If a leaf cannot be sent.
        """
        owned: dict[str | Key, Tensor] = {k: leaf.detach().to("cpu", copy=True) for k, leaf in leaves(tensors)}
        digest = checksum(owned)
        frames = encode("weights", {"version": version, "checksum": digest}, owned)
        size = sum(len(frame) for frame in frames)
        if size > self._limits.max_bytes or len(owned) > self._limits.max_leaves:
            raise ValueError(
                f"weights of {size} bytes in {len(owned)} tensors exceed the {self._limits.max_bytes} bytes or"
                f" {self._limits.max_leaves} tensors of limits; raise them on both sides"
            )
        with self._changed:
            if self._newest is not None and version <= self._newest.version:
                raise ValueError(f"version {version} is not newer than the published {self._newest.version}")
            self._newest = _Published(version, frames)
            self._checksums[version] = digest
            if len(self._checksums) > _REMEMBERED_CHECKSUMS:
                self._checksums.popitem(last=False)
        return digest

    def wait_ack(self, version: int, timeout: float, *, engines: int = 1) -> bool:
        """Wait until so many engines have loaded a version or a newer one.

        Returns:
            True once they have; False after ``timeout`` seconds, or if an engine rejected this very version.
        """

        def acknowledged() -> bool:
            return sum((status.acknowledged or 0) >= version for status in self._engines.values()) >= engines

        def rejected() -> bool:
            return any((status.rejected or (None,))[0] == version for status in self._engines.values())

        with self._changed:
            self._changed.wait_for(lambda: acknowledged() or rejected(), timeout)
            return acknowledged()

    def rejection(self, version: int) -> str | None:
        """Return why an engine did not load a version, or rolled it back; None if none did."""
        with self._changed:
            rejected = [status.rejected for status in self._engines.values() if status.rejected is not None]
        return next((reason for rejected_version, reason in rejected if rejected_version == version), None)

    def close(self, timeout: float = 1.0) -> None:
        """End; messages on their way get at most ``timeout`` seconds. Idempotent."""
        self._thread.close(timeout)

    def _step(self) -> bool:
        if self._socket.poll(_TURN_MS):
            identity, *frames = self._socket.recv_multipart()
            try:
                self._handle(identity, decode(frames, limits=_CONTROL))
            except CodecError as error:
                self.rejected += 1
                if self.rejected == 1:
                    logger.warning(
                        "a message to the weight publisher is dropped (later ones are only counted): %s", error
                    )
        for engine, weights in self._take_offers():
            self._send(engine, weights)
        return not self._thread.closing

    def _take_offers(self) -> list[tuple[bytes, list[Buffer]]]:
        with self._changed:
            newest, offers = self._newest, []
            for status in self._engines.values():
                if newest is None or status.in_flight or newest.version in (status.serving, status.offered):
                    continue
                if newest.version > status.serving:
                    status.offered, status.in_flight = newest.version, True
                    offers.append((status.identity, newest.frames))
            return offers

    def _handle(self, identity: bytes, message: Message) -> None:
        meta = message.meta
        name = _field(meta, "engine", str)[:_MAX_NAME]
        if message.kind == "serving":
            mismatch = self._handshake.mismatch(Handshake.from_meta(meta.get("handshake")))
            if mismatch is not None:
                if mismatch != self.error:
                    logger.warning("engine %r gets no weights: %s", name, mismatch)
                self.error = mismatch
                with self._changed:
                    self._engines.pop(name, None)  # it may have been restarted with another configuration
                self._send(identity, encode("refused", {"reason": mismatch}))
                return
            self._note_serving(name, identity, meta)
            self._send(identity, encode("accepted"))
        elif message.kind == "ack":
            version, digest = _field(meta, "version", int), _field(meta, "checksum", str)
            self._note_loaded(name, identity, version, digest, float(_field(meta, "swap_ms", float, int)))
        elif message.kind == "nack":
            version = _field(meta, "version", int, type(None))
            self._note_rejected(name, identity, version, _field(meta, "reason", str)[:500])
        else:
            raise CodecError(f"an engine sends serving, ack or nack, not {message.kind!r}")

    def _note_serving(self, name: str, identity: bytes, meta: dict[str, Any]) -> None:
        version = _field(meta, "version", int)
        received = _field(meta, "received", int, type(None))
        digest = _field(meta, "checksum", str, type(None))
        with self._changed:
            status = self._engines.get(name)
            if status is None or status.identity != identity:
                status = EngineStatus(identity, version, time.monotonic())
                self._engines[name] = status
            self._engines.move_to_end(name)
            if len(self._engines) > _MAX_ENGINES:
                self._engines.popitem(last=False)
            status.serving, status.last_seen = version, time.monotonic()
            if received is not None and received == status.offered:
                status.in_flight = False
            published = self._newest.version if self._newest else version
            if version > published and not status.ahead:
                logger.warning(
                    "engine %r serves version %d, newer than the published %d, and ignores older ones;"
                    " publish next_version to reach it",
                    *(name, version, published),
                )
            status.ahead = version > published
        if digest is not None:  # repeats the last acknowledgement, in case that was lost with a connection
            self._note_loaded(name, identity, version, digest, None)

    def _note_loaded(self, name: str, identity: bytes, version: int, digest: str, swap_ms: float | None) -> None:
        with self._changed:
            status = self._engines.get(name)
            if status is None or status.identity != identity:
                return
            status.serving = version
            if version == status.offered:
                status.in_flight = False
            if swap_ms is not None:
                status.swap_ms = swap_ms
            published = self._checksums.get(version)
            if published is None:
                return  # from an earlier learner: nothing to compare with
            if digest == published:
                status.acknowledged = version
            else:
                reason = f"the loaded weights have checksum {digest}, the published ones {published}"
                if status.rejected != (version, reason):
                    logger.warning("engine %r did not load version %d: %s", name, version, reason)
                status.rejected = (version, reason)
            self._changed.notify_all()

    def _note_rejected(self, name: str, identity: bytes, version: int | None, reason: str) -> None:
        with self._changed:
            status = self._engines.get(name)
            if status is None or status.identity != identity:
                return
            if version is None or version == status.offered:
                status.in_flight = False
            status.rejected = (version, reason)
            self._changed.notify_all()
        logger.warning("engine %r rejected version %s: %r", name, version, reason)

    def _send(self, identity: bytes, frames: list[Buffer]) -> None:
        try:
            self._socket.send_multipart([identity, *frames], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            # Gone; when it comes back it has another identity and is offered the newest again.


class WeightReceiver:
    """The engine's side: receives and verifies weights in a thread, so that no serving round waits for the network.

    The server polls `latest` between rounds, installs what it gets, and answers with `acknowledge` or `reject`.

    Args:
        address: Address of the learner's publisher, which binds.
        handshake: What this engine is; a learner that differs refuses it, see `error`.
        version: Version of the weights served at the start.
        name: Name of this engine at the learner; the default is unique to the process.
        limits: Limits of a weights message.
        heartbeat_s: Seconds between ``serving`` messages; a restarted learner knows this engine after at most so long.

    Raises:
        OSError: ``address`` is malformed. An absent learner is no error.
    """

    def __init__(
        self,
        address: str,
        *,
        handshake: Handshake,
        version: int = 0,
        name: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        heartbeat_s: float = 1.0,
    ) -> None:
        self.name = name or f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.error: str | None = None
        """Why the learner refused this engine; None once it accepts."""
        self.rejected = 0
        """Messages dropped because they were malformed or their checksum was wrong."""
        self._handshake_meta = handshake.to_meta()
        self._limits, self._heartbeat_s = limits, heartbeat_s
        self._lock = threading.Lock()
        self._version = version
        self._checksum: str | None = None
        self._received: int | None = None
        self._pending: tuple[int, TensorDict] | None = None
        self._replies: deque[list[Buffer]] = deque(maxlen=_MAX_REPLIES)
        self._next_beat = 0.0
        self._socket = open_socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # no stale heartbeats for a learner that comes back
        self._socket.maxmsgsize = limits.max_bytes
        connect(self._socket, address, limits=limits)
        self._thread = SocketThread(self._socket, self._step, name="weight-receiver")
        self._thread.start()

    @property
    def version(self) -> int:
        """The version served, as last acknowledged."""
        return self._version

    def latest(self) -> tuple[int, TensorDict] | None:
        """Take the newest complete weights, verified against the learner's checksum; None if there are no new ones.

        Never blocks. The tensors are the caller's.
        """
        with self._lock:
            pending, self._pending = self._pending, None
            return pending

    def acknowledge(self, version: int, checksum: str, swap_ms: float) -> None:
        """Report weights from `latest` as serving, after a swap for which serving stood still ``swap_ms`` milliseconds.

        ``checksum`` is that of what the model holds now, not of what was received: it finds a swap that did nothing.
        """
        with self._lock:
            self._version, self._checksum = version, checksum
            self._reply("ack", version=version, checksum=checksum, swap_ms=swap_ms)

    def reject(self, version: int, reason: str) -> None:
        """Report that weights from `latest` were not installed and the old ones stay. They are not offered again."""
        with self._lock:
            self._reply("nack", version=version, reason=reason)

    def close(self, timeout: float = 1.0) -> None:
        """End; messages on their way get at most ``timeout`` seconds. Idempotent."""
        self._thread.close(timeout)

    def _reply(self, kind: str, **meta: Any) -> None:
        self._replies.append(encode(kind, {"engine": self.name, **meta}))

    def _step(self) -> bool:
        self._speak()
        if self._socket.poll(_TURN_MS):
            try:
                self._handle(decode(self._socket.recv_multipart(copy=False), limits=self._limits))
            except CodecError as error:
                self.rejected += 1
                logger.warning("a message from the learner is dropped: %s", error)
                with self._lock:  # perhaps weights; unanswered, they would stay in flight for ever
                    self._reply("nack", version=None, reason=str(error))
        return not self._thread.closing

    def _speak(self) -> None:
        with self._lock:
            # A learner that has not met this engine yet ignores its replies, and learns the same from the next line.
            while self._replies and self._send(self._replies[0]):
                self._replies.popleft()
            if time.monotonic() >= self._next_beat:
                state = {"version": self._version, "checksum": self._checksum, "received": self._received}
                serving = encode("serving", {"engine": self.name, **state, "handshake": self._handshake_meta})
                if self._send(serving):  # else nobody is connected: again next turn
                    self._next_beat = time.monotonic() + self._heartbeat_s

    def _send(self, frames: list[Buffer]) -> bool:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _handle(self, message: Message) -> None:
        if message.kind == "accepted":
            self.error = None
        elif message.kind == "refused":
            reason = _field(message.meta, "reason", str)
            if reason != self.error:
                logger.warning("the learner sends no weights: %s", reason)
            self.error = reason
        elif message.kind == "weights":
            version, declared = _field(message.meta, "version", int), _field(message.meta, "checksum", str)
            actual = checksum(message.tensors)
            with self._lock:
                self._received = version
                self._next_beat = 0.0
                if actual != declared:
                    self.rejected += 1
                    self._reply("nack", version=version, reason=f"received checksum {actual}, declared {declared}")
                elif version > max(self._version, self._pending[0] if self._pending else 0):
                    self._pending = version, message.tensors
        else:
            raise CodecError(f"a learner sends accepted, refused or weights, not {message.kind!r}")


def _field(meta: Mapping[str, Any], name: str, *types: type) -> Any:
    """Return a field of a peer's meta, checked to be of one of these types (no bool for an int) and within 64 bits."""
    value = meta.get(name)
    if type(value) not in types or (isinstance(value, int | float) and not abs(value) < 2**63):
        raise CodecError(f"the field {name} is not a {' or '.join(kind.__name__ for kind in types)}")
    return value
