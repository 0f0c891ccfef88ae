"""What sink, collector and weight sync share: opening a ZeroMQ socket, and a thread that owns one."""

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
from collections.abc import Callable
from typing import Any

import zmq
from typing_extensions import override
from zmq.utils.monitor import recv_monitor_message

from aurora_rl.collectors.codec import DEFAULT_LIMITS, Limits
from aurora_rl.collectors.guard import Guard

logger = logging.getLogger(__name__)

# A peer whose machine vanished sends no FIN. ZMTP pings find that out, but a ping waits for the message being sent,
# so the timeout must exceed the transfer of the largest one.
_HEARTBEAT_MS = 5_000
_HEARTBEAT_TIMEOUT_MS = 60_000
_RECONNECT_MS = 100
_RECONNECT_MAX_MS = 2_000


class Socket(zmq.Socket[bytes]):
    """A socket that takes its guard and its context along when it closes."""

    guard: Guard | None = None
    folder: str | None = None  # of the address between the two
    _handshakes: zmq.Socket[bytes] | None = None
    _connected = False

    def watch_peer(self) -> None:
        """Let :attr:`connected` follow the one peer that this socket will connect to."""
        self._handshakes = self.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)

    @property
    def connected(self) -> bool:
        """Whether the watched peer is there: it has completed its handshake, and its connection is open."""
        while self._handshakes is not None and self._handshakes.poll(0):
            self._connected = recv_monitor_message(self._handshakes)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        return self._connected

    @override
    def close(self, linger: int | None = None) -> None:
        if self._handshakes is not None:
            self.disable_monitor()
            self._handshakes.close()
        super().close(linger)
        guard, self.guard = self.guard, None
        if guard is not None:
            guard.close((linger or 0) / 1000)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.context.term()  # once messages have left

    def private_path(self) -> str:
        """Return a path that only this user can reach."""
        self.folder = tempfile.mkdtemp(prefix="aurora-rl-")
        return f"{self.folder}/s"


def open_socket(kind: int) -> Socket:
    """Return a socket, of a kind such as ``zmq.PUSH``, that notices dead peers, reconnects and never delays an exit."""
    socket = Socket(zmq.Context(), kind)
    socket.linger = 0
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
    return socket


def bind(socket: Socket, address: str, *, limits: Limits = DEFAULT_LIMITS) -> str:
    """Bind, guarded against peers whose messages never end, and return the address with the real port.

    Args:
        socket: Socket from `open_socket`, with all its options set.
        address: ``tcp://host:port`` (port ``*`` or 0: any free one) or ``ipc://path``.
        limits: Limits of a message; a peer that exceeds them loses its connection.

    Raises:
        OSError: The address is taken, malformed or a file that is no socket; the socket is closed then.
    """
    try:
        _check(address, binds=True)
        if address.startswith("ipc://") and _has_listener(address.removeprefix("ipc://")):
            # ZeroMQ unlinks the file and takes over, which leaves the first process listening to nobody.
            raise zmq.ZMQError(errno.EADDRINUSE)
        if address.startswith("ipc://"):
            _check_deletable(address.removeprefix("ipc://"))
        # ZeroMQ knows how to read an address; once it has left it, the guard listens there.
        with zmq.Context() as context, context.socket(zmq.PULL) as probe:
            probe.bind(address)
            bound = probe.getsockopt_string(zmq.LAST_ENDPOINT)
        listener = _listen(bound)
        try:
            path = socket.private_path()
            socket.bind(f"ipc://{path}")
        except BaseException:
            listener.close()
            raise
        socket.guard = Guard(listener, lambda: _dial(f"ipc://{path}"), limits=limits, accepts=True, name=bound)
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


def connect(socket: Socket, address: str, *, limits: Limits | None = None) -> None:
    """Connect in the background; the peer need not exist yet.

    Args:
        socket: Socket from `open_socket`, with all its options set.
        address: Address as for `bind`.
        limits: Limits of a message from the peer, which loses the connection if it exceeds them; None if nothing is
            received, or not for long.

    Raises:
        OSError: The address is malformed; the socket is closed then.
    """
    try:
        _check(address, binds=False)
        if limits is None:
            socket.connect(address)
            return
        path = socket.private_path()
        listener = _listen(f"ipc://{path}")
        socket.guard = Guard(listener, lambda: _dial(address), limits=limits, accepts=False, name=address)
        socket.connect(f"ipc://{path}")
    except (zmq.ZMQError, OSError) as error:
        socket.close()
        raise OSError(
            error.errno, f"cannot connect to {address!r}: {error}; expected tcp://host:port or ipc://path"
        ) from None


def _check(address: str, *, binds: bool) -> None:
    """Refuse what is malformed, and a TCP port that does not exist: systems take it modulo 65536."""
    port = re.fullmatch(r"tcp://.+:(-?[0-9]+)", address)
    if port is None and not re.fullmatch(r"tcp://.+:[*]|ipc://.+" if binds else r"ipc://.+", address):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    lowest = 0 if binds else 1
    if port and not lowest <= int(port[1]) <= 65535:
        raise OSError(errno.EINVAL, f"port {port[1]} does not lie in {lowest}..65535")


def _check_deletable(path: str) -> None:
    """Refuse a path whose file is no socket: binding deletes what a process that is gone has left there."""
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


def _dial(address: str) -> plain.socket:
    family, where = _endpoint(address)
    dialed = plain.socket(family)
    try:
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
