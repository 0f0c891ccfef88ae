"""Code that sink, collector and weight sync share: opening a ZeroMQ socket, and a thread that owns one."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import socket as plain
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, cast

import zmq
from typing_extensions import override
from zmq.utils.monitor import recv_monitor_message

from aurora_rl.addresses import is_local
from aurora_rl.collectors.admission import KEY_NAME, Admission
from aurora_rl.collectors.codec import DEFAULT_LIMITS, Limits
from aurora_rl.collectors.keys import ClientKeys, ServerKeys
from aurora_rl.collectors.relay import Relay, near_address

logger = logging.getLogger(__name__)

# A peer whose machine vanished sends no FIN. ZMTP pings find that out, but a ping waits for the message being sent,
# so the timeout must exceed the transfer of the largest one.
_HEARTBEAT_MS = 5_000
_HEARTBEAT_TIMEOUT_MS = 60_000
_RECONNECT_MS = 100
_MAX_NAME = 128  # a host's name, a process and a random part have less
_RECONNECT_MAX_MS = 2_000


class Socket(zmq.Socket[bytes]):
    """A socket that takes its relay, its admission and its context along when it closes."""

    relay: Relay | None = None
    admission: Admission | None = None
    folder: str | None = None  # folder of the address between the two
    bound_file: tuple[str, os.stat_result] | None = None  # of an ipc address that is bound
    key_refused = False
    """Whether the watched peer has refused our key at the last attempt."""
    connections = 0
    """Connections to the watched peer so far."""
    _handshakes: zmq.Socket[bytes] | None = None
    _connected = False

    def watch_peer(self) -> None:
        """Let :attr:`connected` and :attr:`key_refused` follow the one peer that this socket will connect to."""
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        self._handshakes = self.get_monitor_socket(events)

    @property
    def connected(self) -> bool:
        """Whether the watched peer is there: it has completed its handshake, and its connection is open."""
        while self._handshakes is not None and self._handshakes.poll(0):
            event = recv_monitor_message(self._handshakes)["event"]
            self._connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self.connections += self._connected
            if event != zmq.EVENT_DISCONNECTED:
                self.key_refused = event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
        return self._connected

    @property
    def refused(self) -> int:
        """Connections that were refused for their keys."""
        return 0 if self.admission is None else self.admission.refused

    @override
    def poll(self, timeout: int | None = None, flags: int = zmq.POLLIN) -> int:
        ready = super().poll(timeout, flags)
        if self.relay is not None and flags & zmq.POLLIN and not ready:
            self.relay.asked_in_vain()
        return ready

    @override
    def recv_multipart(self, flags: int = 0, copy: bool = True, track: bool = False) -> Any:
        frames = cast("list[zmq.Frame]", super().recv_multipart(flags, copy=False, track=track))
        if self.relay is not None:
            body = frames[self.type == zmq.ROUTER :]  # the frame that a ROUTER puts first did not come over the network
            self.relay.taken(peer_of(body), [len(frame) for frame in body])
        return [frame.bytes for frame in frames] if copy else frames

    @override
    def close(self, linger: int | None = None) -> None:
        if self._handshakes is not None:
            self.disable_monitor()
            self._handshakes.close()
        super().close(linger)
        relay, self.relay = self.relay, None
        if relay is not None:
            relay.close((linger or 0) / 1000)
        admission, self.admission = self.admission, None
        if admission is not None:
            admission.close()
        if self.bound_file is not None:
            path, bound = self.bound_file
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(path), bound):  # and not that of a process which took the address over
                    os.unlink(path)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.context.term()  # once messages have left

    def private_path(self) -> str:
        """Return a path that only this user can reach."""
        self.folder = tempfile.mkdtemp(prefix="aurora-rl-")
        return f"{self.folder}/s"


def engine_name(keys: ClientKeys | None = None) -> str:
    """Return a name for an engine of this process: its key's or, without keys, one that no other has."""
    return keys.name if keys is not None else f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def open_socket(kind: int) -> Socket:
    """Return a socket, of a kind such as ``zmq.PUSH``, that notices dead peers, reconnects and never delays an exit."""
    socket = Socket(zmq.Context(), kind)
    socket.linger = 0
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
    return socket


def bind(socket: Socket, address: str, *, limits: Limits = DEFAULT_LIMITS, keys: ServerKeys | None = None) -> str:
    """Bind, guarded against peers whose messages never end, and return the address with the real port.

    Args:
        socket: Socket from `open_socket`, with all its options set.
        address: ``tcp://host:port`` (port ``*`` or 0: any free one) or ``ipc://path``.
        limits: Limits of a message; a peer that exceeds them loses its connection.
        keys: Keys for CurveZMQ, which encrypts, and admits peers by their keys. None is for addresses of this host.

    Raises:
        OSError: The address is taken, malformed, a file that is no socket, or can be reached from elsewhere and has no
            keys; the socket is closed then.
    """
    try:
        _check(address, binds=True)
        if keys is None and not is_local(address):
            raise OSError(errno.EACCES, "other hosts can reach it, which needs keys: `aurora-rl keys` makes them")
        if address.startswith("ipc://"):
            _check_deletable(address.removeprefix("ipc://"))
        # ZeroMQ knows how to read an address; once it has left it, the relay listens there.
        with zmq.Context() as context, context.socket(zmq.PULL) as probe:
            probe.bind(address)
            bound = probe.getsockopt_string(zmq.LAST_ENDPOINT)
        listener = _listen(bound)
        try:
            inside = _bind_inside(socket, keys, bound)
        except BaseException:
            listener.close()
            raise
        socket.relay = Relay(
            listener,
            lambda number: _dial(inside, None if keys is None else number),
            limits=limits,
            accepts=True,
            sealed=keys is not None,
            name=bound,
        )
        if bound.startswith("ipc://") and not bound.startswith("ipc://@"):
            path = bound.removeprefix("ipc://")
            socket.bound_file = path, os.lstat(path)
    except (zmq.ZMQError, OSError) as error:
        socket.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                errno.EADDRINUSE,
                f"{address} is in use; stop the process that holds it or choose another address"
                " (tcp://127.0.0.1:* takes any free port)",
            ) from None
        raise OSError(
            error.errno, f"cannot bind {address!r}: {error}; expected tcp://host:port or ipc://path"
        ) from None
    return bound


def _bind_inside(socket: Socket, keys: ServerKeys | None, name: str) -> str:
    """Bind the address that the relay connects to, and return the address."""
    if keys is None:
        address = f"ipc://{socket.private_path()}"
        socket.bind(address)
        return address
    socket.curve_server = True
    socket.curve_secretkey = keys.secret
    socket.zap_domain = b"aurora-rl"
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody is let in while nobody answers libzmq
    socket.admission = Admission(
        socket, keys, lambda peer: peer if socket.relay is None else socket.relay.peer_of(peer), name
    )
    # The address of a peer names its connection, which takes TCP. A peer that goes past the relay needs a key as well.
    socket.bind("tcp://127.0.0.1:*")
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect(socket: Socket, address: str, *, limits: Limits | None = None, keys: ClientKeys | None = None) -> None:
    """Connect in the background; the peer need not exist yet.

    Args:
        socket: Socket from `open_socket`, with all its options set.
        address: Address as for `bind`.
        limits: Limits of a message from the peer, as for `bind`; None if nothing is received, or not for long.
        keys: Keys for CurveZMQ: only the peer with the server key of them is talked to, encrypted.

    Raises:
        OSError: The address is malformed; the socket is closed then.
    """
    try:
        _check(address, binds=False)
        if keys is not None:
            socket.curve_serverkey, socket.curve_publickey = keys.server, keys.public
            socket.curve_secretkey = keys.secret
        if limits is None:
            socket.connect(address)
            return
        path = socket.private_path()
        listener = _listen(f"ipc://{path}")
        socket.relay = Relay(
            listener,
            lambda number: _dial(address),
            limits=limits,
            accepts=False,
            sealed=keys is not None,
            name=address,
        )
        socket.connect(f"ipc://{path}")
    except (zmq.ZMQError, OSError) as error:
        socket.close()
        raise OSError(
            error.errno, f"cannot connect to {address!r}: {error}; expected tcp://host:port or ipc://path"
        ) from None


def peer_of(frames: list[zmq.Frame], field: str = "Peer-Address") -> str:
    """Return what libzmq knows of the peer that a message came from, or an empty string.

    ``field`` is "Peer-Address", as the socket sees it, or `admission.KEY_NAME`.
    """
    try:
        return cast("str", frames[-1].get(field))
    except (zmq.ZMQError, IndexError):
        return ""


def sender_of(frames: list[zmq.Frame], claimed: object) -> str:
    """Return the name of the engine that a message came from.

    It is that of the key that was admitted or, without keys, the first 128 characters of the name that the message
    claims. Empty if that cannot be printed.
    """
    if name := peer_of(frames, KEY_NAME):
        return name
    return claimed[:_MAX_NAME] if isinstance(claimed, str) and claimed.isprintable() else ""


def _check(address: str, *, binds: bool) -> None:
    """Refuse what is malformed, and a TCP port that does not exist: systems take it modulo 65536."""
    port = re.fullmatch(r"tcp://.+:(-?[0-9]+)", address)
    if port is None and not re.fullmatch(r"tcp://.+:[*]|ipc://.+" if binds else r"ipc://.+", address):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    lowest = 0 if binds else 1
    if port and not lowest <= int(port[1]) <= 65535:
        raise OSError(errno.EINVAL, f"port {port[1]} does not lie in {lowest}..65535")


def _check_deletable(path: str) -> None:
    """Refuse a path whose file is no socket, or one that a process listens at: binding deletes what is there."""
    if _has_listener(path):
        # ZeroMQ would unlink the file and take over, which leaves the first process listening to nobody.
        raise zmq.ZMQError(errno.EADDRINUSE)
    if path.startswith("@"):
        return  # a name of Linux's own, without a file
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, f"{path} exists and is no socket; choose another path, or remove it")


def _endpoint(address: str) -> tuple[int, Any]:
    """Return family and address of a plain socket."""
    scheme, rest = address.split("://", 1)
    if scheme == "ipc":
        return plain.AF_UNIX, "\0" + rest[1:] if rest.startswith("@") else rest
    host, port = rest.rsplit(";", 1)[-1].rsplit(":", 1)
    family, _, _, _, where = plain.getaddrinfo(host.strip("[]"), int(port), type=plain.SOCK_STREAM)[0]
    return family, where


def _listen(address: str) -> plain.socket:
    family, where = _endpoint(address)
    listener = plain.socket(family)
    try:
        if family == plain.AF_UNIX and not where.startswith("\0"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(where)  # a socket of a process that is gone: `bind` has asked
        listener.setsockopt(plain.SOL_SOCKET, plain.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(100)
    except BaseException:
        listener.close()
        raise
    return listener


def _dial(address: str, number: int | None = None) -> plain.socket:
    """Connect, from the near address of a connection if its number is known."""
    family, where = _endpoint(address)
    dialed = plain.socket(family)
    try:
        if number is not None:
            dialed.bind((near_address(number), 0))
        if family != plain.AF_UNIX:
            dialed.setsockopt(plain.IPPROTO_TCP, plain.TCP_NODELAY, 1)
        dialed.connect(where)
    except BaseException:
        dialed.close()
        raise
    return dialed


def _has_listener(path: str) -> bool:
    with contextlib.closing(plain.socket(plain.AF_UNIX, plain.SOCK_STREAM)) as probe:
        probe.settimeout(1.0)  # a listener that does not answer is as good as none
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


class SocketThread:
    """A daemon thread that owns a socket (ZeroMQ's must not be shared) and calls ``step`` until it returns False.

    Args:
        socket: Socket, handed over; closed by the thread.
        step: One short turn of work, at most some tens of milliseconds, so that `close` is prompt.
        name: Name of the thread.
    """

    def __init__(self, socket: Socket, step: Callable[[], bool], *, name: str) -> None:
        self._socket, self._step = socket, step
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread. The constructor does not, since ``step`` may read the attribute that holds this object."""
        self._thread.start()

    @property
    def closing(self) -> bool:
        """Whether `close` has been called."""
        return self._deadline is not None

    @property
    def expired(self) -> bool:
        """Whether the time that `close` allowed is over."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def close(self, timeout: float) -> None:
        """Ask the thread to end and wait; idempotent, and bounded by ``timeout`` plus one second for its last step."""
        if self._deadline is None:
            self._deadline = time.monotonic() + timeout
        self._thread.join(timeout + 1.0)

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except zmq.ZMQError as error:
            logger.warning("%s stops: %s", self._thread.name, error)
        finally:
            left = max(0.0, (self._deadline or 0.0) - time.monotonic())
            self._socket.close(linger=int(left * 1000))
