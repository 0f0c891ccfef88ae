"""Bounds what a peer can make ZeroMQ hold: a relay that reads the framing of ZMTP before ZeroMQ does.

libzmq keeps the parts of a multipart message to itself until the last one has arrived; ``ZMQ_MAXMSGSIZE`` bounds a part
and nothing bounds their number. So a peer that never sends the last part grows the process without end, and no reader
of the socket sees it. A :class:`Guard` stands between the network and the socket and closes such a connection.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

from aurora_rl.collectors.codec import Limits

logger = logging.getLogger(__name__)

_GREETING = 64
_MORE, _LARGE, _COMMAND = 1, 2, 4
_MAX_COMMAND = 1 << 16  # bytes; READY and PING, the commands of honest peers, have less than one thousand
# Parts beyond those of a message: with a few too many it is read, and whoever sent it is told what is wrong.
_SPARE_PARTS = 64
_CHUNK = 1 << 18
_MAX_CONNECTIONS = 256
# Unfinished messages of all connections together: one of the largest, and never less than this.
_LEAST_TOTAL = 1 << 26
_GRACE_S = 0.2  # for bytes that the closed ZeroMQ socket had already written


class TooLong(ValueError):
    """A peer sends more than a message may have, or no ZMTP 3 at all."""


class Meter:
    """Follows the framing of one direction of a ZMTP 3 connection; ``held`` are the bytes of the unfinished message."""

    def __init__(self, limits: Limits) -> None:
        self._max_bytes, self._max_parts = limits.max_bytes, limits.max_leaves + _SPARE_PARTS
        self._head = bytearray()
        self._greeted = False
        self._flags = self._left = self._parts = 0  # of the frame: flags, and bytes to come; frames of the message
        self.held = 0

    def feed(self, data: memoryview) -> None:
        """Take in the next bytes of the connection.

        Raises:
            TooLong: The unfinished message has too many parts or bytes, or these are no frames of ZMTP 3.
        """
        at = 0
        while at < len(data):
            if self._left:
                step = min(self._left, len(data) - at)
                at, self._left = at + step, self._left - step
                if not self._flags & _COMMAND:
                    self.held += step
            else:
                missing = self._head_size() - len(self._head)
                self._head += data[at : at + missing]
                at += missing
                if len(self._head) < self._head_size():
                    continue
                self._begin(bytes(self._head))
                self._head.clear()
            if not self._left and not self._flags & (_COMMAND | _MORE):
                self._parts = self.held = 0

    def _head_size(self) -> int:
        if not self._greeted:
            return _GREETING
        return 9 if self._head and self._head[0] & _LARGE else 2

    def _begin(self, head: bytes) -> None:
        if not self._greeted:
            # ZeroMQ also speaks older versions, whose frames differ.
            if head[0] != 0xFF or not head[9] & 1 or head[10] < 3:
                raise TooLong("it does not speak ZMTP 3")
            self._greeted, self._flags = True, _COMMAND
            return
        self._flags, self._left = head[0], int.from_bytes(head[1:])
        if self._flags & _COMMAND:
            if self._flags & _MORE or self._left > _MAX_COMMAND:
                raise TooLong(f"a command of {self._left} bytes with flags {self._flags}")
            return
        self._parts += 1
        if self._parts > self._max_parts or self.held + self._left > self._max_bytes:
            raise TooLong(
                f"its message has more than the {self._max_bytes} bytes or {self._max_parts} parts that are accepted"
            )


class Guard:
    """Relays the connections of a listening socket, and closes those whose messages exceed the limits.

    Args:
        listener: Socket that takes connections; closed by :meth:`close`.
        dial: Opens the connection that an accepted one is relayed to; OSError closes the accepted one.
        limits: Limits of a message that comes from the network. Unfinished messages of all connections together may
            hold as much as one message, at least 64 MiB; above it the connection that holds most is closed.
        accepts: Whether the network is where connections are accepted from, and not where they are relayed to.
        name: Name of the socket, for the log.
    """

    def __init__(
        self, listener: socket.socket, dial: Callable[[], socket.socket], *, limits: Limits, accepts: bool, name: str
    ) -> None:
        self._listener, self._dial, self._limits, self._accepts, self._name = listener, dial, limits, accepts, name
        self._total = max(limits.max_bytes, _LEAST_TOTAL)
        self._lock = threading.Lock()
        self._held: dict[tuple[socket.socket, socket.socket], int] = {}
        self._relays: set[threading.Thread] = set()
        self._warned = self._closing = False
        self._thread = threading.Thread(target=self._listen, name="guard", daemon=True)
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Listen no more, and wait for what is on its way to the network.

        Args:
            timeout: Seconds; connections that are still open then are closed.
        """
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listener.close()
        self._thread.join(1.0)
        deadline = time.monotonic() + timeout + _GRACE_S
        for relay in list(self._relays):
            relay.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            for pair in self._held:
                _shut(*pair)

    def _listen(self) -> None:
        while not self._closing:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                time.sleep(0.01)  # also where the process has no file descriptors left, which may pass
                continue
            if len(self._relays) >= _MAX_CONNECTIONS:
                self._warn(accepted, f"there are {_MAX_CONNECTIONS} connections already")
                accepted.close()
                continue
            if accepted.family != socket.AF_UNIX:
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            relay = threading.Thread(target=self._relay, args=(accepted,), name="guard-relay", daemon=True)
            self._relays.add(relay)
            relay.start()

    def _relay(self, accepted: socket.socket) -> None:
        try:
            with accepted, contextlib.suppress(OSError), self._dial() as dialed:
                pair = (accepted, dialed) if self._accepts else (dialed, accepted)
                with self._lock:
                    self._held[pair] = 0
                outward = threading.Thread(target=_send_out, args=pair, name="guard-outward", daemon=True)
                outward.start()
                try:
                    self._take_in(*pair)
                finally:
                    outward.join()
                    with self._lock:
                        del self._held[pair]
        finally:
            self._relays.discard(threading.current_thread())

    def _take_in(self, network: socket.socket, inside: socket.socket) -> None:
        meter, chunk = Meter(self._limits), memoryview(bytearray(_CHUNK))
        try:
            while count := network.recv_into(chunk):
                meter.feed(chunk[:count])
                self._bound((network, inside), meter.held)
                inside.sendall(chunk[:count])
        except TooLong as error:
            self._warn(network, str(error))
            _shut(network, inside)
        except OSError:
            pass
        # Only this half: ZeroMQ reads on to the end of what it was sent, and closes then.
        with contextlib.suppress(OSError):
            inside.shutdown(socket.SHUT_WR)

    def _bound(self, pair: tuple[socket.socket, socket.socket], held: int) -> None:
        with self._lock:
            self._held[pair] = held
            if sum(self._held.values()) <= self._total:
                return
            largest = max(self._held, key=self._held.__getitem__)
            self._held[largest] = 0
        self._warn(largest[0], f"unfinished messages exceed {self._total} bytes, and it holds most of them")
        _shut(*largest)

    def _warn(self, network: socket.socket, reason: str) -> None:
        if not self._warned:
            self._warned = True
            peer = ""
            with contextlib.suppress(OSError):
                peer = str(network.getpeername())
            logger.warning("a connection %s of %s is closed (later ones without a word): %s", peer, self._name, reason)


def _send_out(network: socket.socket, inside: socket.socket) -> None:
    chunk = memoryview(bytearray(_CHUNK))
    with contextlib.suppress(OSError):
        while count := inside.recv_into(chunk):
            with contextlib.suppress(OSError):  # a peer that left: what it sent before is still being taken in
                network.sendall(chunk[:count])
    _shut(network)


def _shut(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
