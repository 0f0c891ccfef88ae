"""The listening socket and uvicorn, in a thread."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import threading
import time
from http import HTTPStatus

import httptools
import uvicorn
from starlette.types import ASGIApp
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from aurora_rl.serving.http.errors import ApiError
from aurora_rl.telemetry.throttle import Throttle

logger = logging.getLogger(__name__)
_throttle = Throttle(logger)

_HEAD_S = 20  # seconds for the head of a request, from its first byte or from the connection's opening
_MAX_HEAD = 1 << 16  # bytes of a head
_UNREAD_S = 60  # close a connection whose client reads nothing for this many seconds
_KEEP_ALIVE_S = 75
_SHUTDOWN_S = 5
_BACKLOG = 2048  # connections that wait to be accepted


class _Connection(HttpToolsProtocol):
    """A connection that a silent client cannot hold open. It stays HTTP/1.1, and the number of connections is bounded.

    At most half of the descriptors that the process may open are clients': the rest are for the log, the learner and
    the wire. Uvicorn bounds the requests only, and none of these come from a silent client.

    A client may offer to go on with another protocol: Java's and ``curl --http2`` offer HTTP/2 with each request. The
    offer is ignored, as RFC 9110 (7.8) allows. httptools would skip the body of such a request.
    """

    _timer: asyncio.TimerHandle | None = None
    _in_head, _head = False, 0  # whether a head is being read, and its bytes in earlier packets than its first
    _refused = False  # nothing more is read

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        if len(self.connections) > most:
            message = f"{most} connections are open, half of the limit of open files (ulimit -n); try again later"
            self._refuse(ApiError(503, message, code="too_many_connections", headers={"Retry-After": "1"}))
        else:
            self._await_head()

    @override
    def data_received(self, data: bytes) -> None:
        if self._refused:
            return None
        self._unset_keepalive_if_required()
        self._head = self._head + len(data) if self._in_head else 0
        if self._head > _MAX_HEAD:
            return self._refuse(ApiError(431, f"the head of the request has more than {_MAX_HEAD} bytes"))
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserError as error:
                return self._refuse(ApiError(400, f"the request is not HTTP/1.1: {error}", code="bad_http"))
            except httptools.HttpParserUpgrade as upgrade:
                if self.parser.get_method() == b"CONNECT":
                    return self._refuse(ApiError(405, "the server is no proxy, and does not take CONNECT"))
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._await_head()

    @override
    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # and no trailer, which nobody checked
            super().on_header(name, value)

    @override
    def on_headers_complete(self) -> None:
        self._in_head = False
        if not self.parser.should_upgrade():  # else they come again
            super().on_headers_complete()

    @override
    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _head_without_upgrade(self) -> bytes:
        """Return the head that was read, without the header that offers another protocol."""
        first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = [b"%b: %b" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([first, *headers, b"\r\n"])

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close the connection."""
        _throttle.warning("refused", "a connection was refused: %s", error.message)
        self._refused = True
        if self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body):
            self.cycle.keep_alive = False  # its answer is the last: nothing is written into it
            return
        body = json.dumps(error.body()).encode()
        status = HTTPStatus(error.status)
        headers = {
            "Content-Type": "application/json", "Content-Length": len(body), "Connection": "close", **error.headers,
        }  # fmt: skip
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        self.transport.write("\r\n".join([*lines, "\r\n"]).encode() + body)
        self.transport.close()

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader(self.transport.get_write_buffer_size())

    def _await_reader(self, waiting: int) -> None:
        """Cut the connection if its client reads nothing: closing it would wait for what was written."""

        def look() -> None:
            left = self.transport.get_write_buffer_size()
            if left >= waiting:
                self.transport.abort()
            elif self.flow.write_paused or self.transport.is_closing():
                self._await_reader(left)

        if waiting:
            self.loop.call_later(_UNREAD_S, look)

    def _await_head(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self._timer is None:
            self._timer = self.loop.call_later(_HEAD_S, self.transport.close)
        elif not waits and self._timer is not None:
            self._timer.cancel()
            self._timer = None


class HttpServer:
    """Serve an application from a thread of this process.

    The port is taken when the object is made, so that a port in use is an error before a model is loaded. Clients
    may connect from then on, and are answered after :meth:`start`. Port 0 takes a free one, which ``url`` tells.

    Raises:
        ValueError: The address cannot be used.
    """

    def __init__(self, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(_BACKLOG)  # until then another server may bind the port, and fail only as it starts
        except (OSError, TypeError) as error:  # a TypeError for a host that cannot be a name
            self._socket.close()
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"cannot listen at http.host={host}, http.port={port}: {reason}; choose others, or "
                "port 0 for any that is free"
            ) from error
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._socket.getsockname()[1]}"
        self._uvicorn: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self, app: ASGIApp) -> None:
        """Begin to answer, and return once it does."""
        config = uvicorn.Config(
            app,
            http=_Connection,
            backlog=_BACKLOG,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._uvicorn.run, kwargs={"sockets": [self._socket]}, name="http", daemon=True
        )
        self._thread.start()
        while not self._uvicorn.started:
            if not self._thread.is_alive():
                raise RuntimeError("the HTTP server did not start; see the log")
            time.sleep(0.01)

    def stop(self) -> None:
        """Close the port, let answers end for a few seconds, and end the thread."""
        if self._uvicorn is not None and self._thread is not None:
            self._uvicorn.should_exit = True
            self._thread.join()
        self._socket.close()
