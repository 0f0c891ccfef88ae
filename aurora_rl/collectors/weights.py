"""Versioned drafter weights from the learner to the engines.

The engine speaks first and repeats itself; so either side may start, vanish or restart at any time:

- engine (DEALER, connects): ``serving`` {version, checksum, received, handshake} when connected, after each change and
  as heartbeat; ``ack`` {version, checksum, swap_ms} of what was loaded, or ``nack`` {version, reason}. A nack also has
  ``taken``, a number, if weights of an earlier learner with it are on trial: the next number must be larger.
- learner (ROUTER, binds): ``accepted`` {}, or ``refused`` {reason} where the handshake differs; ``weights`` {version,
  checksum, identity} and tensors, if newer than what the engine serves. The identity is the handshake's.

The learner keeps the newest weights only, and while some engines try them those of the others; weights with several
numbers are kept once. It sends an engine no more before the last ones have arrived there (its ``received`` tells). So a
slow engine skips versions, and no queue grows. Over one connection ZeroMQ loses nothing. A new connection has a new
identity, and for it everything starts afresh.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping
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
    field,
    leaves,
    short,
)
from aurora_rl.collectors.engine_book import EngineBook, EngineStatus
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import ClientKeys, ServerKeys
from aurora_rl.collectors.sockets import SocketThread, bind, connect, engine_name, open_socket, sender_of
from aurora_rl.plausible import implausible
from aurora_rl.telemetry.throttle import Throttle

logger = logging.getLogger(__name__)

_TURN_MS = 50  # a thread that wakes up takes the interpreter from the rounds
_HEARTBEAT_S = 1.0  # between two ``serving`` messages: a restarted learner knows an engine after so long
_SILENCE_S = 5.0  # without an answer, after which a warning says that the learner is silent
_CONTROL = Limits(max_bytes=1 << 16, max_leaves=0, max_header_bytes=1 << 16)
_MAX_REPLIES = 64
_MAX_JUMP = 1 << 52  # largest step of an engine's version: the next learner needs room above it


class WeightPublisher:
    """The learner's side: offers the newest weights to every engine, in a thread of its own.

    Args:
        address: Address to bind; ``tcp://127.0.0.1:*`` takes a free port, see `address`.
        handshake: What an engine's handshake must equal before it gets weights.
        keys: Keys for CurveZMQ, needed where other hosts can reach the address.
        limits: Limits of a message, the same on both sides: weights that engines would refuse are refused here.

    Raises:
        OSError: The address is taken or cannot be bound.
    """

    def __init__(
        self, address: str, *, handshake: Handshake, keys: ServerKeys | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.error: str | None = None
        """How the latest refused engine differed."""
        self.rejected = 0  # malformed messages dropped
        self._handshake, self._limits = handshake, limits
        self._frames: dict[int, tuple[str, list[Buffer]]] = {}  # checksum and message, by version that is to be had
        self._publishing = threading.Lock()
        self._book, self._log = EngineBook(), Throttle(logging.getLogger(__name__))
        self._socket = open_socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # report an engine that is gone instead of dropping silently
        self._socket.maxmsgsize = _CONTROL.max_bytes
        self.address = bind(self._socket, address, limits=_CONTROL, keys=keys)
        self._thread = SocketThread(self._socket, self._step, name="weight-publisher")
        self._thread.start()

    @property
    def refused(self) -> int:
        """Connections refused so far for their keys."""
        return self._socket.refused

    @property
    def engines(self) -> dict[str, EngineStatus]:
        """A copy of what is known, by engine name."""
        return self._book.engines

    @property
    def served(self) -> list[tuple[str, int, str]]:
        """Name, version and checksum of what each engine says that it serves, unless it was published here."""
        others = (status for status in self.engines.values() if status.acknowledged != status.serving)
        return [(status.name, status.serving, status.checksum) for status in others if status.checksum is not None]

    @property
    def next_version(self) -> int:
        """Above everything published here and served by engines that are heard; a fresh learner goes on from here."""
        return self._book.next_version

    @property
    def overtaken(self) -> bool:
        """Whether an engine needs what is served under a new number.

        It ignores the version that it is to have, as it serves a newer one or other weights of it. Or that version was
        withdrawn, and this engine did not reject it: it came later, or loaded the version after all.
        """
        return self._book.overtaken

    def publish(
        self,
        version: int,
        tensors: TensorDictBase | Mapping[str | Key, Tensor],
        engines: Collection[str] | None = None,
    ) -> str:
        """Make these the newest weights, and return the checksum that acknowledgements must repeat.

        They are copied and hashed in the calling thread, and sent in another.

        Args:
            version: Version, larger than any before; an engine that serves it or a later one ignores the weights.
            tensors: Tensors on any device; they may be trained on as soon as this returns.
            engines: Names of the engines that are to have them, until others are published for these or for all. None
                means all engines, those that connect later too.

        Raises:
            ValueError: ``version`` is not larger than the last one, or the weights exceed ``limits``.
            CodecError: If a leaf cannot be sent.
        """
        named = sorted(leaves(tensors), key=lambda leaf: leaf[0])
        owned: dict[str | Key, Tensor] = {key: leaf.detach().to("cpu", copy=True) for key, leaf in named}
        digest = checksum(owned)
        meta = {"version": version, "checksum": digest, "identity": self._handshake.identity}
        frames = encode("weights", meta, owned)
        size = sum(len(frame) for frame in frames)
        if size > self._limits.max_bytes or len(owned) > self._limits.max_leaves:
            raise ValueError(
                f"weights of {size} bytes in {len(owned)} tensors exceed the {self._limits.max_bytes} bytes or"
                f" {self._limits.max_leaves} tensors of limits; raise them (wire.max_message) on both sides"
            )
        with self._publishing:
            self._book.publish(version, digest, engines)
            for kept_digest, kept in self._frames.values():
                if kept_digest == digest:  # the same tensors under another number
                    frames[1:] = kept[1:]
                    break
            self._frames[version] = digest, frames
            self._prune()
        return digest

    def _prune(self) -> None:
        wanted = self._book.wanted
        self._frames = {number: kept for number, kept in self._frames.items() if number in wanted}

    def wait_ack(self, version: int, timeout: float, *, engines: int = 1) -> bool:
        """Wait until so many engines have loaded a version or a newer one.

        Returns:
            True once they have; False after ``timeout`` seconds, or if an engine rejected this very version.
        """
        return self._book.wait_ack(version, timeout, engines)

    def rejected_by(self, version: int) -> dict[str, str]:
        """Return why engines did not load a version, or rolled it back, by their names.

        Such an engine goes on with its former weights and is offered the next version.
        """
        return self._book.rejected_by(version)

    def withdraw(self, version: int) -> bool:
        """Withdraw a version if engines rejected it and no connected engine serves it.

        A version that one engine serves stays, however many reject it. Engines that have not answered yet are waited
        for, ten minutes from the first rejection at most.

        Returns:
            Whether the version was withdrawn. Then no engine is offered it any more; see :attr:`overtaken`.
        """
        with self._publishing:
            withdrawn = self._book.withdraw(version)
            self._prune()
        return withdrawn

    def close(self, timeout: float = 1.0) -> None:
        """End; messages on their way get at most ``timeout`` seconds. Idempotent."""
        self._thread.close(timeout)

    def _step(self) -> bool:
        if self._socket.poll(_TURN_MS):
            identity, *frames = self._socket.recv_multipart(copy=False)
            try:
                message = decode(frames, limits=_CONTROL)
                self._handle(identity.bytes, sender_of(frames, field(message.meta, "engine", str)), message)
            except CodecError as error:
                self.rejected += 1
                self._log.warning("malformed", "a message to the weight publisher is dropped: %s", error)
        with self._publishing:
            due = [(identity, self._frames[version][1]) for identity, version in self._book.due()]
        for engine, weights in due:
            self._send(engine, weights)
        return not self._thread.closing

    def _handle(self, identity: bytes, name: str, message: Message) -> None:
        meta = message.meta
        if message.kind == "serving":
            engine = Handshake.from_meta(meta.get("handshake"))
            if (mismatch := self._handshake.mismatch(engine)) is not None:
                self.error = mismatch
                self._log.warning("refused", "engine %r gets no weights: %s", name, mismatch)
                self._book.forget(identity)
                # What this side has is not told: whoever asks could find it out field by field.
                self._send(identity, encode("refused", {"reason": self._handshake.mismatch(engine, values=False)}))
                return
            self._book.note_serving(identity, name, meta)
            self._send(identity, encode("accepted"))
        elif message.kind == "ack":
            self._book.note_ack(identity, meta)
        elif message.kind == "nack":
            self._book.note_nack(identity, meta)
        else:
            raise CodecError(f"an engine sends serving, ack or nack, not {message.kind!r}")

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
        keys: Keys for CurveZMQ, if the learner has keys.
        version: Version of the weights served at the start.
        checksum: Their `codec.checksum`, so that a learner can tell whether it has them; None says nothing of them.
        name: Name of this engine at a learner without keys, the same as its sink's; the default is unique to this
            receiver. A learner with keys takes the key's.
        limits: Limits of a weights message.

    Raises:
        OSError: ``address`` is malformed. An absent learner is no error.
    """

    def __init__(
        self,
        address: str,
        *,
        handshake: Handshake,
        keys: ClientKeys | None = None,
        version: int = 0,
        checksum: str | None = None,
        name: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.name = name or engine_name(keys)
        self.error: str | None = None
        """Why the learner refused this engine; None once it accepts."""
        self.rejected = 0
        """Messages dropped because they were malformed or their checksum was wrong."""
        self._key = f"engines/{keys.name}.key" if keys is not None else ""
        self._handshake_meta, self._identity = handshake.to_meta(), handshake.identity
        self._limits = limits
        self._heard: float | None = None  # when the learner said something last
        self._silent = False
        self._lock, self._log = threading.Lock(), Throttle(logging.getLogger(__name__))
        self.version = version
        """The version served, as last acknowledged."""
        self._checksum = checksum
        self._received: int | None = None
        self._pending: tuple[int, TensorDict] | None = None
        self._newest = version, checksum  # number and declared checksum of the newest weights that came
        self._replies: deque[list[Buffer]] = deque(maxlen=_MAX_REPLIES)
        self._next_beat = 0.0
        self._socket = open_socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # no stale heartbeats for a learner that comes back
        self._socket.maxmsgsize = limits.max_bytes
        self._socket.watch_peer()
        connect(self._socket, address, limits=limits, keys=keys)
        self._thread = SocketThread(self._socket, self._step, name="weight-receiver")
        self._thread.start()

    def latest(self) -> tuple[int, TensorDict] | None:
        """Take the newest complete weights, verified against the learner's checksum; None if there are no new ones.

        Never blocks. The tensors are the caller's.
        """
        with self._lock:
            pending, self._pending = self._pending, None
            return pending

    def acknowledge(self, version: int, checksum: str, swap_ms: float) -> None:
        """Report weights from `latest` as serving, after a swap for which serving stood still ``swap_ms`` milliseconds.

        ``checksum`` is that of what the model holds now. The embedded engine hashes that, which finds a swap that did
        nothing; engines of other processes compare what they hold with what was received, and give the latter's.
        """
        with self._lock:
            self.version, self._checksum = version, checksum
            self._reply("ack", version=version, checksum=checksum, swap_ms=swap_ms)

    def go_back(self, version: int) -> None:
        """Say from now on that an earlier version serves, of which no checksum is known."""
        with self._lock:
            self.version, self._checksum, self._next_beat = version, None, 0.0

    def reject(self, version: int, reason: str) -> None:
        """Report that weights from `latest` were not installed and the old ones stay. They are not offered again."""
        with self._lock:
            self._newest = min(self._newest, (self.version, self._checksum), key=lambda weights: weights[0])
            self._reply("nack", version=version, reason=reason)

    def close(self, timeout: float = 1.0) -> None:
        """End; messages on their way get at most ``timeout`` seconds. Idempotent."""
        self._thread.close(timeout)

    def _reply(self, kind: str, **meta: Any) -> None:
        self._replies.append(encode(kind, {"engine": self.name, **meta}))

    def _step(self) -> bool:
        self._note_refused_key()
        self._speak()
        self._note_silence()
        if self._socket.poll(_TURN_MS):
            try:
                self._note_heard()
                self._handle(decode(self._socket.recv_multipart(copy=False), limits=self._limits))
            except CodecError as error:
                self.rejected += 1
                self._log.warning("malformed", "a message from the learner is dropped: %s", error)
                with self._lock:  # perhaps weights; unanswered, they would stay in flight for ever
                    self._reply("nack", version=None, reason=str(error))
        return not self._thread.closing

    def _note_refused_key(self) -> None:
        if not self._socket.connected and self._socket.key_refused and self.error is None:
            self.error = (
                f"the learner does not know the key of this engine; copy {self._key} to the folder of its wire.keys"
            )
            self._log.warning("key", "%s", self.error)

    def _note_silence(self) -> None:
        if self._heard is not None and not self._silent and time.monotonic() - self._heard > _SILENCE_S:
            self._silent = True
            logger.warning(
                "the learner has not answered for %.0f s; serving goes on with version %d",
                *(_SILENCE_S, self.version),
            )

    def _note_heard(self) -> None:
        now = time.monotonic()
        if self._silent and self._heard is not None:
            logger.warning("the learner answers again, after %.0f s", now - self._heard)
        self._heard, self._silent = now, False

    def _speak(self) -> None:
        with self._lock:
            # A learner that has not met this engine yet ignores its replies, and learns the same from the next line.
            while self._replies and self._send(self._replies[0]):
                self._replies.popleft()
            # Nobody is there without a learner, and composing the message in every turn took 3% of a core.
            if time.monotonic() >= self._next_beat and self._socket.poll(0, zmq.POLLOUT):
                state = {"version": self.version, "checksum": self._checksum, "received": self._received}
                serving = encode("serving", {"engine": self.name, **state, "handshake": self._handshake_meta})
                if self._send(serving):  # else the learner went away since the poll: again next turn
                    self._next_beat = time.monotonic() + _HEARTBEAT_S

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
            reason = field(message.meta, "reason", str)
            if reason != self.error:
                self._log.warning("refused", "the learner sends no weights: %s", reason)
            self.error = reason
        elif message.kind == "weights":
            version, declared = field(message.meta, "version", int), field(message.meta, "checksum", str)
            refusal = self._refusal(message, version, declared)
            with self._lock:
                self._received = version
                self._next_beat = 0.0
                if refusal is not None:
                    self._log.warning("weights", "version %d is refused, %d stays: %s", version, self.version, refusal)
                    self.rejected += 1
                    self._reply("nack", version=version, reason=refusal)
                elif version > max(self.version, self._newest[0]):
                    self._pending, self._newest = (version, message.tensors), (version, declared)
                elif version > self.version and (version, declared) != self._newest:
                    # A learner that has just begun gives numbers that its predecessor's weights have here, on trial.
                    reason = f"version {self._newest[0]} of an earlier learner is about to be served"
                    self._reply("nack", version=version, reason=reason, taken=self._newest[0])
        else:
            raise CodecError(f"a learner sends accepted, refused or weights, not {message.kind!r}")

    def _refusal(self, message: Message, version: int, declared: str) -> str | None:
        """Return why these weights are not to be served; None if they may be."""
        tensors, identity = message.tensors, message.meta.get("identity")
        if identity != self._identity:
            return (
                f"weights of another target or drafter: their identity is {short(identity)}, this engine's "
                f"{self._identity!r}; start learner and engine with the same model, dtype and drafter"
            )
        if (actual := checksum(tensors)) != declared:
            return f"received checksum {actual}, declared {declared}"
        if version > self.version + _MAX_JUMP:
            return f"version {version} leaves no room for later ones"
        for name, tensor in tensors.flatten_keys(".").items():
            if (fault := implausible(tensor)) is not None:
                return f"tensor {name!r} {fault}; lower the learning rate"
        return None
