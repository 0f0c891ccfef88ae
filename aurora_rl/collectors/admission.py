"""Admits the peers of a listening socket by their public keys, and counts and logs those that are refused."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from aurora_rl.collectors.keys import ServerKeys, WireKeyError
from aurora_rl.telemetry.throttle import Throttle

_ADDRESS = "inproc://zeromq.zap.01"  # where libzmq asks, by the ZeroMQ Authentication Protocol (RFC 27)
KEY_NAME = "Key-Name"
"""Property of every message: the name of its sender's key."""


class Admission:
    """Answers libzmq's questions whether a key is admitted, in a thread.

    Args:
        socket: Listening socket, alone in its context; this object must be closed after it and before its context.
        keys: Keys of the socket.
        peer_of: Returns the network address of a peer by the address that libzmq sees.
        name: Address of the socket, for the log.

    Attributes:
        refused: Connections refused so far: an unknown key, another key than ours expected, or no CurveZMQ at all.
    """

    def __init__(self, socket: zmq.Socket[bytes], keys: ServerKeys, peer_of: Callable[[str], str], name: str) -> None:
        self._keys, self._peer_of, self._name = keys, peer_of, name
        self.refused = 0
        self._log = Throttle(logging.getLogger(__name__))
        self._wake, self._close = os.pipe()
        self._questions = socket.context.socket(zmq.REP)
        self._questions.bind(_ADDRESS)
        self._failures = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
        self._thread = threading.Thread(target=self._run, name="admission", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and its sockets."""
        os.close(self._close)
        self._thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        for each in (self._questions, self._failures, self._wake):
            poller.register(each, zmq.POLLIN)
        while self._wake not in (ready := dict(poller.poll())):
            if self._questions in ready:
                self._answer()
            if self._failures in ready:
                event = recv_monitor_message(self._failures)
                if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                    self._refuse("a connection", "it does not speak CurveZMQ, or expects another public key here")
        os.close(self._wake)
        self._questions.close(0)
        self._failures.close(0)

    def _answer(self) -> None:
        version, request, _, address, _, _, *credentials = self._questions.recv_multipart()
        public = z85.encode(credentials[0]) if credentials and len(credentials[0]) == 32 else b""
        try:
            name = self._keys.name_of(public)
        except WireKeyError as fault:  # a file that was added since
            name = None
            self._log.warning("keys", "%s", fault)
        if name is None:
            peer = f"a peer from {self._peer_of(address.decode())}"
            self._refuse(peer, f"its public key {public.decode()} is not in {self._keys.admitted}")
        # Not as the user id: libzmq puts that before the first message, and a poll takes it for one.
        status, metadata = (b"400", b"") if name is None else (b"200", _property(KEY_NAME, name))
        self._questions.send_multipart([version, request, status, b"", b"", metadata])

    def _refuse(self, peer: str, reason: str) -> None:
        self.refused += 1
        self._log.warning("refused", "%s is refused at %s (%d so far): %s", peer, self._name, self.refused, reason)


def _property(name: str, value: str) -> bytes:
    """Return metadata as ZMTP has it."""
    return bytes([len(name)]) + name.encode() + len(value).to_bytes(4) + value.encode()
