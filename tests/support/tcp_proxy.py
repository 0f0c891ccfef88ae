"""A network that can be cut: relays TCP connections to another port, until it is told not to."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class TCPProxy:
    """Relays connections at a free port of its own to a port of this host.

    Attributes:
        port: Its own port.
    """

    def __init__(self, target: int) -> None:
        self._target, self._cut, self._closed = target, threading.Event(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """Let nothing through: neither bytes of connections that there are, nor new ones, and nobody is told."""
        self._cut.set()

    def heal(self) -> None:
        """Let everything through again. What was connected finds its connection broken, as after a long cut."""
        for each in self._sockets:
            with contextlib.suppress(OSError):  # it is shut down already
                each.shutdown(socket.SHUT_RDWR)
        self._cut.clear()

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which ends a thread that accepts
        self.heal()
        for thread in self._threads:
            thread.join(10)
        for each in (self._listener, *self._sockets):
            each.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            while self._cut.is_set():
                time.sleep(0.02)
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # nobody listens there now
                client.close()
                continue
            self._sockets += [client, server]
            for pair in ((client, server), (server, client)):
                self._threads.append(threading.Thread(target=self._relay, args=pair, daemon=True))
                self._threads[-1].start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                while self._cut.is_set():
                    time.sleep(0.02)
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
