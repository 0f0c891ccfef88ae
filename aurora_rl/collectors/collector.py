"""The learner's end of the trajectory stream."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

import zmq
from tensordict import TensorDict, TensorDictBase

from aurora_rl.collectors.codec import DEFAULT_LIMITS, CodecError, Limits, Message, decode, field
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import ServerKeys
from aurora_rl.collectors.sink import DELETION, TRAJECTORY
from aurora_rl.collectors.sockets import bind, open_socket, sender_of
from aurora_rl.telemetry.engine_counts import EngineCounts
from aurora_rl.telemetry.throttle import Throttle
from aurora_rl.tenants import check_tenant

_TURN_S = 0.1


class ZMQCollector:
    """Receives packed trajectories from any number of engines.

    The engines own their decode loops, so this collector steps no environment. In one process,
    :class:`aurora_rl.collectors.TrajectoryCollector` steps a :class:`aurora_rl.envs.SpecDecodeEnv`.

    A message that is malformed, from another deployment or refused by ``validate`` is dropped and counted, not raised.

    Args:
        address: Address to bind, such as ``tcp://0.0.0.0:5555``; ``tcp://127.0.0.1:*`` takes a free port, see
            `address`.
        handshake: What an engine's handshake must equal.
        keys: Keys for CurveZMQ, needed where other hosts can reach the address.
        validate: Raises ValueError for a trajectory whose contents do not fit together.
        on_trajectory: Called with each trajectory that is accepted, before :meth:`poll` returns it.
        limits: Limits of a message.
        high_water: Messages that ZeroMQ may hold per engine, and the most that one `poll` looks at.

    Raises:
        ValueError: ``high_water`` is not positive.
        OSError: The address is taken or cannot be bound.
    """

    def __init__(
        self,
        address: str,
        *,
        handshake: Handshake,
        keys: ServerKeys | None = None,
        validate: Callable[[TensorDictBase], None] | None = None,
        on_trajectory: Callable[[TensorDictBase], None] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        high_water: int = 64,
    ) -> None:
        if high_water < 1:
            raise ValueError(f"high_water must be positive, got {high_water}")
        self.rejections: Counter[str] = Counter()
        """Dropped messages by kind: ``malformed``, ``handshake`` or ``invalid``."""
        self.engines = EngineCounts()
        """The same by engine; its reader may count more."""
        self.handshake_error: str | None = None
        """How the latest engine of another deployment differed."""
        self._handshake = handshake
        self._handshake_meta = handshake.to_meta()
        self._validate, self._on_trajectory = validate, on_trajectory
        self._limits = limits
        self._high_water = high_water
        self._closed = False
        self._deletions: dict[str, float] = {}
        self._log = Throttle(logging.getLogger(__name__))
        self._lock = threading.Lock()  # shutdown may come from another thread than poll
        self._socket = open_socket(zmq.PULL)
        self._socket.rcvhwm = high_water
        self._socket.maxmsgsize = limits.max_bytes  # a larger frame is refused before it is received
        self.address = bind(self._socket, address, limits=limits, keys=keys)

    @property
    def refused(self) -> int:
        """Connections refused so far for their keys."""
        return self._socket.refused

    @property
    def rejected(self) -> int:
        """Messages dropped so far."""
        return self.rejections.total()

    def poll(self, timeout_s: float = 0.0) -> list[TensorDict]:
        """Take the trajectories that have arrived, oldest first, and at most ``high_water``.

        Args:
            timeout_s: Seconds to wait for the first one; the others are not waited for.

        Returns:
            Valid trajectories that own their memory; empty if none arrived, or after `shutdown`. "source" of each is
            the name of its engine's key or, without keys, the name that the engine gives itself. "tenant" is whom its
            request was for, empty if it named nobody. "captured" is the Unix time at which the request ended, and
            "seconds" for how long it was decoded, None if its engine did not say.
        """
        deadline = time.monotonic() + timeout_s
        trajectories: list[TensorDict] = []
        looked_at = 0
        # The second condition keeps a flood of bad messages from holding the learner here.
        while len(trajectories) < self._high_water and (looked_at < self._high_water or time.monotonic() < deadline):
            frames = self._receive(0.0 if trajectories else deadline - time.monotonic())
            if frames is None:
                break
            looked_at += 1
            if (trajectory := self._accept(frames)) is not None:
                trajectories.append(trajectory)
        return trajectories

    def take_deletions(self) -> dict[str, float]:
        """Take the tenants whose data is to be deleted, with the Unix times up to which; :meth:`poll` receives them."""
        deletions, self._deletions = self._deletions, {}
        return deletions

    def shutdown(self) -> None:
        """Close the socket. Idempotent; ends a `poll` in another thread within 0.1 s."""
        self._closed = True
        with self._lock:
            self._socket.close()

    def _receive(self, timeout_s: float) -> list[zmq.Frame] | None:
        deadline = time.monotonic() + timeout_s
        while True:
            left = min(_TURN_S, max(0.0, deadline - time.monotonic()))
            with self._lock:
                if self._closed:
                    return None
                if self._socket.poll(int(left * 1000)):
                    return self._socket.recv_multipart(copy=False)
            if time.monotonic() >= deadline:
                return None

    def _accept(self, frames: list[zmq.Frame]) -> TensorDict | None:
        source = sender_of(frames, None)
        try:
            message = decode(frames, limits=self._limits)
            if message.kind not in (TRAJECTORY, DELETION):
                raise CodecError(f"expected a {TRAJECTORY!r} or {DELETION!r} message, got {message.kind!r}")
            # Equal JSON spares parsing the same handshake with every trajectory.
            meta = message.meta.get("handshake")
            source = sender_of(frames, message.meta.get("engine"))
            engine = self._handshake if meta == self._handshake_meta else Handshake.from_meta(meta)
            tenant, time_s, seconds = _fields_of(message)
        except CodecError as error:
            self._reject("malformed", source, error)
            return None
        if (mismatch := self._handshake.mismatch(engine)) is not None:
            self.handshake_error = mismatch
            self._reject("handshake", source, mismatch)
            return None
        if message.kind == DELETION:
            self._deletions[tenant] = max(time_s, self._deletions.get(tenant, 0.0))
            return None
        if self._validate is not None:
            try:
                self._validate(message.tensors)
            except (ValueError, TypeError, LookupError, RuntimeError) as error:  # no message may end the learner
                self._reject("invalid", source, error)
                return None
        if self._on_trajectory is not None:
            self._on_trajectory(message.tensors)
        notes = {"source": source, "tenant": tenant, "captured": time_s, "seconds": seconds}
        for name, value in notes.items():
            message.tensors.set_non_tensor(name, value)
        return message.tensors

    def _reject(self, kind: str, source: str, reason: object) -> None:
        self.rejections[kind] += 1
        self.engines.dropped(source, kind)
        self._log.warning(kind, "a trajectory of %s is dropped, %s: %s", source or "a peer", kind, reason)


def _fields_of(message: Message) -> tuple[str, float, float | None]:
    """Return a message's tenant, empty if it has none, the time of its request's end or of its deletion, and seconds.

    The seconds are those for which the request was decoded; None is an engine of an earlier release, or a deletion.

    Raises:
        CodecError: A field is malformed, a deletion lacks its tenant or has tensors, or seconds are less than 1e-6.
    """
    meta, now = {"tenant": None, "captured": None, "seconds": None} | message.meta, time.time()
    deletes = message.kind == DELETION
    tenant = field(meta, "tenant", str) if deletes else field(meta, "tenant", str, type(None))
    if tenant is not None:
        try:
            check_tenant(tenant)
        except ValueError as error:
            raise CodecError(str(error)) from error
    if deletes and len(message.tensors.keys()):
        raise CodecError(f"a {DELETION!r} message has no tensors, this one has {len(message.tensors.keys())}")
    if deletes:
        time_s = float(field(meta, "before", float, int))
    else:
        # None is an engine of an earlier release. A clock ahead of ours must not make a trajectory live longer.
        time_s = min(field(meta, "captured", float, int, type(None)) or now, now)
    seconds = field(meta, "seconds", float, int, type(None))
    if seconds is not None and seconds < 1e-6:
        raise CodecError(f"a request is decoded for a microsecond at least, this one for {seconds} s")
    return tenant or "", time_s, None if seconds is None else float(seconds)
