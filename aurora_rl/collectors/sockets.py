"""What sink, collector and weight sync share: opening a ZeroMQ socket, and a thread that owns one."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket as unix
import threading
import time
from collections.abc import Callable

import zmq

__all__ = ["SocketThread", "bind", "connect", "open_socket"]

logger = logging.getLogger(__name__)

# A peer whose machine vanished sends no FIN. ZMTP pings find that out, but a ping waits behind the message being sent,
# so the timeout must exceed the transfer of the largest one.
_HEARTBEAT_MS = 5_000
_HEARTBEAT_TIMEOUT_MS = 60_000
_RECONNECT_MS = 100
_RECONNECT_MAX_MS = 2_000


def open_socket(kind: int, context: zmq.Context | None) -> tuple[zmq.Socket, zmq.Context | None]:
    """A socket that notices dead peers, reconnects within seconds and never delays the end of the process.

    Args:
        kind: of socket, for example ``zmq.PUSH``.
        context: to share; None: a new one.

    Returns:
        The socket, and the new context, which the caller must terminate after the socket; None if it was shared.
    """
    owned = None
    if context is None:
        context = owned = zmq.Context()
    socket = context.socket(kind)
    socket.linger = 0
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
    return socket, owned


def bind(socket: zmq.Socket, address: str, owned: zmq.Context | None = None) -> str:
    """Bind, and close everything if that fails.

    Args:
        socket: with all its options set.
        address: ``tcp://host:port`` (port ``*`` or 0: any free one), ``ipc://path`` or ``inproc://name``.
        owned: context from `open_socket`, terminated on failure.

    Returns:
        The address as bound, with the real port.

    Raises:
        OSError: if the address is taken or cannot be bound; the text names it and the cure.
    """
    try:
        if address.startswith("ipc://") and _has_listener(address.removeprefix("ipc://")):
            # ZeroMQ unlinks the file and takes over, which leaves the first process listening to nobody.
            raise zmq.ZMQError(errno.EADDRINUSE)
        socket.bind(address)
    except zmq.ZMQError as error:
        _close(socket, owned)
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                errno.EADDRINUSE,
                f"{address} is in use; stop the process that holds it or choose another address"
                " (tcp://127.0.0.1:* takes any free port)",
            ) from None
        raise OSError(
            error.errno, f"cannot bind {address!r}: {error}; expected tcp://host:port or ipc://path"
        ) from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect(socket: zmq.Socket, address: str, owned: zmq.Context | None = None) -> None:
    """Connect in the background; the peer need not exist yet.

    Raises:
        OSError: if the address is malformed; socket and ``owned`` are closed then.
    """
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        _close(socket, owned)
        raise OSError(
            error.errno, f"cannot connect to {address!r}: {error}; expected tcp://host:port or ipc://path"
        ) from None


def _close(socket: zmq.Socket, owned: zmq.Context | None) -> None:
    socket.close()
    if owned is not None:
        owned.term()


def _has_listener(path: str) -> bool:
    with contextlib.closing(unix.socket(unix.AF_UNIX, unix.SOCK_STREAM)) as probe:
        probe.settimeout(1.0)  # a listener that does not answer is as good as none
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


class SocketThread:
    """A daemon thread that owns a socket (ZeroMQ's must not be shared) and calls ``step`` until it returns False.

    Args:
        socket: handed over; closed by the thread.
        step: one short turn of work, at most some tens of milliseconds, so that `close` is prompt.
        name: of the thread.
        owned_context: terminated by the thread at its end, which waits for messages on their way out; None: left alone.
    """

    def __init__(
        self, socket: zmq.Socket, step: Callable[[], bool], *, name: str, owned_context: zmq.Context | None
    ) -> None:
        self._socket = socket
        self._step = step
        self._owned_context = owned_context
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin; apart from the constructor, since ``step`` may look at what its owner stores this object in."""
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
        except zmq.ZMQError as error:  # for example the owner of a shared context terminated it
            logger.warning("%s stops: %s", self._thread.name, error)
        finally:
            left = max(0.0, (self._deadline or 0.0) - time.monotonic())
            self._socket.close(linger=int(left * 1000))
            if self._owned_context is not None:
                self._owned_context.term()
