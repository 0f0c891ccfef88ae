"""Bounds the memory that a peer can make ZeroMQ hold: a relay that reads the framing of ZMTP before ZeroMQ does.

libzmq keeps the parts of a multipart message to itself until the last one has arrived; ``ZMQ_MAXMSGSIZE`` bounds a part
and nothing bounds their number. So a peer that never sends the last part grows the process without end, and no reader
of the socket sees it. It also takes whole messages from every peer, however slow their reader is. A :class:`Relay`
stands between the network and the socket. It closes the connection of a message without end, and lets peers wait while
what the reader has not taken exceeds a limit.

CurveZMQ encrypts the flag that says whether more parts follow. There the relay counts what was relayed of each
connection and not taken by the reader. Where nothing can be taken although the limit is reached, the messages are
unfinished, and the connection with most of them is closed.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from aurora_rl.collectors.codec import Limits

logger = logging.getLogger(__name__)

_GREETING = 64
_MORE, _LARGE, _COMMAND = 1, 2, 4
_MAX_COMMAND = 1 << 16  # bytes; READY and PING, the commands of honest peers, have less than one thousand
_SEAL = 33  # bytes that CurveZMQ adds to a part
# Parts beyond those of a message: with a few too many it is read, and whoever sent it is told what is wrong.
_SPARE_PARTS = 64
_LEAST_COST = 64  # bytes that libzmq needs for a part, however small
_CHUNK = 1 << 18
_MAX_CONNECTIONS = 256
# Unfinished messages of all connections together: one of the largest, and never less than this. As much again in
# messages that the reader has not taken.
_LEAST_TOTAL = 1 << 26
_GRACE_S = 0.2  # seconds for bytes that the closed ZeroMQ socket had already written
_STALL_S = 2.0  # seconds after which a reader that received nothing counts as stalled
_PING_COST_PER_S = 64.0  # under CurveZMQ, PING and PONG look like parts, and no reader takes them


class TooLongError(ValueError):
    """A peer sends more than a message may have, or no ZMTP 3 at all."""


class Meter:
    """Follows the framing of one direction of a ZMTP 3 connection.

    Args:
        limits: Limits of a message.
        sealed: Whether parts are encrypted, so that the end of a message cannot be seen.

    Attributes:
        held: Bytes of the unfinished message; 0 if sealed.
        spoken: Whether a message has begun.
    """

    def __init__(self, limits: Limits, *, sealed: bool = False) -> None:
        self._max_bytes, self._max_parts, self._sealed = limits.max_bytes, limits.max_leaves + _SPARE_PARTS, sealed
        self._head = bytearray()
        self._greeted = False
        self._flags = self._left = self._parts = 0  # flags of the frame, bytes to come, frames of the message
        self._cost = 0
        self.held, self.spoken = 0, False

    def feed(self, data: memoryview) -> int:
        """Take in the next bytes of the connection.

        Returns:
            Cost of the messages that have ended in them. Sealed: of the parts that have begun in them.

        Raises:
            TooLongError: The unfinished message has too many parts or bytes, or these are no frames of ZMTP 3.
        """
        at = passed = 0
        while at < len(data):
            if self._left:
                step = min(self._left, len(data) - at)
                at, self._left = at + step, self._left - step
                if not self._flags & _COMMAND and not self._sealed:
                    self.held += step
            else:
                missing = self._head_size() - len(self._head)
                self._head += data[at : at + missing]
                at += missing
                if len(self._head) < self._head_size():
                    continue
                self._begin(bytes(self._head))
                self._head.clear()
                if self._sealed:
                    passed, self._cost = passed + self._cost, 0
            if not self._left and not self._flags & (_COMMAND | _MORE):
                passed, self._cost = passed + self._cost, 0
                self._parts = self.held = 0
        return passed

    def _head_size(self) -> int:
        if not self._greeted:
            return _GREETING
        return 9 if self._head and self._head[0] & _LARGE else 2

    def _begin(self, head: bytes) -> None:
        if not self._greeted:
            # ZeroMQ also speaks older versions, whose frames differ.
            if head[0] != 0xFF or not head[9] & 1 or head[10] < 3:
                raise TooLongError("it does not speak ZMTP 3")
            self._greeted, self._flags = True, _COMMAND
            return
        self._flags, self._left = head[0], int.from_bytes(head[1:])
        if self._flags & _COMMAND:
            if self._flags & _MORE or self._left > _MAX_COMMAND:
                raise TooLongError(f"a command of {self._left} bytes with flags {self._flags}")
            return
        self.spoken = True
        size = max(self._left - _SEAL, 0) if self._sealed else self._left
        self._cost += cost(size)
        self._parts += 1
        if self._parts > self._max_parts or self.held + size > self._max_bytes:
            raise TooLongError(
                f"its message has more than the {self._max_bytes} bytes or {self._max_parts} parts that are accepted"
            )


def cost(size: int) -> int:
    """Return the bytes that count for a part of a message."""
    return max(size, _LEAST_COST)


class Relay:
    """Relays the connections of a listening socket, and closes those whose messages exceed the limits.

    The reader of the socket tells by `taken` and `asked_in_vain` how it gets on.

    Args:
        listener: Socket that takes connections; closed by :meth:`close`.
        dial: Opens the connection that an accepted one is relayed to, by the connection's number. The reader sees
            `near_address` of this number as the address of its peer if the connections are sealed. OSError closes the
            accepted one.
        limits: Limits of a message that comes from the network. Unfinished messages of all connections together may
            hold as much as one message, at least 64 MiB; above it the connection that holds most is closed. As much
            again may wait for the reader; above it peers wait.
        accepts: Whether the network is where connections are accepted from, and not where they are relayed to.
        sealed: Whether the connections are encrypted by CurveZMQ.
        name: Name of the socket, for the log.
    """

    def __init__(
        self,
        listener: socket.socket,
        dial: Callable[[int], socket.socket],
        *,
        limits: Limits,
        accepts: bool,
        sealed: bool = False,
        name: str,
    ) -> None:
        self._listener, self._dial, self._limits, self._accepts, self._name = listener, dial, limits, accepts, name
        self._sealed, self._total = sealed, max(limits.max_bytes, _LEAST_TOTAL)
        self._lock = threading.Lock()
        self._moved = threading.Condition(self._lock)  # the reader has taken something
        self._held: dict[tuple[socket.socket, socket.socket], int] = {}
        self._silent: dict[tuple[socket.socket, socket.socket], None] = {}  # no message has come yet; oldest first
        # Cost of what was relayed and not taken, by address; all in one where the reader sees no addresses.
        self._inside = Counter[str]()
        self._peers: dict[str, str] = {}  # network address of each open connection, by its near address
        self._takes = self._vain = 0
        self._relays: set[threading.Thread] = set()
        self._warned = self._closing = False
        self._thread = threading.Thread(target=self._listen, name="relay", daemon=True)
        self._thread.start()

    def taken(self, address: str, sizes: Sequence[int]) -> None:
        """Note that the reader has taken a message, whose parts have these sizes, of the peer at a near address."""
        with self._moved:
            key = address if self._sealed and self._accepts else ""
            self._inside[key] = max(self._inside[key] - sum(map(cost, sizes)), 0)
            if not self._inside[key] and key not in self._peers:
                del self._inside[key]
            self._takes += 1
            self._moved.notify_all()

    def asked_in_vain(self) -> None:
        """Note that the reader has found no message."""
        self._vain += 1

    def peer_of(self, address: str) -> str:
        """Return the network address of the open connection that the reader sees as ``address``."""
        return self._peers.get(address, address)

    def close(self, timeout: float) -> None:
        """Listen no more, and wait for what is on its way to the network.

        Args:
            timeout: Seconds; connections that are still open then are closed.
        """
        with self._moved:
            self._closing = True
            self._moved.notify_all()
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
        number = 0
        while not self._closing:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                time.sleep(0.01)  # also where the process has no file descriptors left, which may pass
                continue
            if len(self._relays) >= _MAX_CONNECTIONS and not self._make_room():
                self._warn(accepted, f"there are {_MAX_CONNECTIONS} connections already")
                accepted.close()
                continue
            if accepted.family != socket.AF_UNIX:
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number += 1
            relay = threading.Thread(target=self._relay, args=(accepted, number), name="relay-connection", daemon=True)
            self._relays.add(relay)
            relay.start()

    def _make_room(self) -> bool:
        """Close the oldest connection that has said nothing yet. Return False if there is none."""
        with self._lock:
            pair = next(iter(self._silent), None)
            if pair is None or len(self._relays) >= 2 * _MAX_CONNECTIONS:  # those that were closed are still ending
                return False
            del self._silent[pair]
        _shut(*pair)
        return True

    def _relay(self, accepted: socket.socket, number: int) -> None:
        key = near_address(number) if self._sealed and self._accepts else ""
        try:
            with accepted, contextlib.suppress(OSError), self._dial(number) as dialed:
                pair = (accepted, dialed) if self._accepts else (dialed, accepted)
                with self._lock:
                    self._held[pair], self._silent[pair] = 0, None
                    self._peers[key] = _name_of(pair[0])
                outward = threading.Thread(target=_send_out, args=pair, name="relay-outward", daemon=True)
                outward.start()
                try:
                    self._take_in(*pair, key)
                finally:
                    outward.join()
                    with self._lock:
                        del self._held[pair]
                        self._silent.pop(pair, None)
                        self._peers.pop(key, None)
        finally:
            self._relays.discard(threading.current_thread())

    def _take_in(self, network: socket.socket, inside: socket.socket, key: str) -> None:
        meter, chunk = Meter(self._limits, sealed=self._sealed), memoryview(bytearray(_CHUNK))
        since = time.monotonic()
        try:
            while count := network.recv_into(chunk):
                passed = meter.feed(chunk[:count])
                if meter.spoken:
                    self._silent.pop((network, inside), None)
                self._bound((network, inside), meter.held)
                now = time.monotonic()
                pings = int(_PING_COST_PER_S * (now - since)) if self._sealed else 0
                with self._lock:  # before the reader can have it
                    self._inside[key] = max(self._inside[key] + passed - pings, 0)
                since = now
                inside.sendall(chunk[:count])
                self._await_reader(key)
        except TooLongError as error:
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

    def _await_reader(self, key: str) -> None:
        """Wait while the reader has too much to take.

        Raises:
            TooLongError: It can take nothing, and the most of what it has are unfinished messages of this connection.
        """
        with self._moved:
            while self._inside.total() > self._total and not self._closing:
                takes, vain = self._takes, self._vain
                self._moved.wait(_STALL_S)
                if self._takes > takes or self._vain < vain + 2:  # it gets on, or it does not ask
                    continue
                for gone in self._inside.keys() - self._peers.keys():
                    del self._inside[gone]  # unfinished messages end with their connection
                if not self._sealed:
                    self._inside.clear()  # bytes of connections that were closed before ZeroMQ read them
                elif self._inside[key] == max(self._inside.values()):
                    self._inside[key] = 0
                    raise TooLongError(f"unfinished messages exceed {self._total} bytes, and it holds most of them")

    def _warn(self, network: socket.socket, reason: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "a connection %s of %s is closed (later ones without a word): %s",
                *(_name_of(network), self._name, reason),
            )


def near_address(number: int) -> str:
    """Return an address of this host's loopback by the number of a connection, so that its messages can be told apart.

    >>> near_address(1), near_address(70_000)
    ('127.1.0.1', '127.2.17.112')
    """
    return f"127.{1 + (number >> 16) % 254}.{number >> 8 & 255}.{number & 255}"


def _name_of(network: socket.socket) -> str:
    with contextlib.suppress(OSError):
        peer = network.getpeername()
        return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else str(peer)
    return ""


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
