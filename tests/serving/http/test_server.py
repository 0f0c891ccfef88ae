"""Connections are bounded in number and in silence, stay HTTP/1.1, and a port in use is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from processes import wait
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from aurora_rl.serving.http import server as http_server
from aurora_rl.serving.http.server import HttpServer


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_connections_are_bounded_by_the_files_that_may_be_open(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = rig.serve()
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8, 8))
    with contextlib.ExitStack() as clients:
        for _ in range(4):
            clients.enter_context(connect(url)).sendall(b"GET")  # and no more of the head
        with connect(url) as connection:
            told = b"".join(iter(lambda: connection.recv(1000), b""))
        assert told.startswith(b"HTTP/1.1 503") and b"too_many_connections" in told and b"4 connections" in told
    wait(lambda: httpx.get(f"{url}/health").status_code == 200)


def test_a_connection_without_the_head_of_a_request_is_closed(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_HEAD_S", 0.2)
    url = rig.serve()
    with connect(url) as silent, connect(url) as slow, connect(url) as asked:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost:")
        asked.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert asked.recv(1000).startswith(b"HTTP/1.1 200")
        assert silent.recv(10) == b"" and slow.recv(10) == b""
        time.sleep(0.3)
        asked.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")  # a connection is kept between two requests
        assert asked.recv(1000).startswith(b"HTTP/1.1 200")
        asked.sendall(b"GET /health HTTP/1.1\r\n")
        assert asked.recv(10) == b""


def test_an_answer_may_take_longer_than_a_head(slow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_HEAD_S", 0.1)
    answer = httpx.post(
        f"{slow.serve()}/v1/completions", json={"prompt": "Once", "max_tokens": 40, "stop": ["never there"]}, timeout=30
    )
    assert answer.status_code == 200 and answer.elapsed.total_seconds() > 0.2


def test_a_port_that_is_in_use_is_told_before_anything_is_served() -> None:
    first = HttpServer("127.0.0.1", 0)
    try:
        port = int(first.url.rpartition(":")[2])
        with pytest.raises(ValueError, match=f"cannot listen at http.host=127.0.0.1, http.port={port}: .*in use"):
            HttpServer("127.0.0.1", port)
    finally:
        first.stop()


@pytest.mark.parametrize("parts", [(None,), (-8, None), (20, 60, -20, None)])
def test_an_offer_of_another_protocol_is_ignored(
    rig: Any, parts: tuple[int | None, ...], caplog: pytest.LogCaptureFixture
) -> None:
    body = b'{"prompt": "Once", "max_tokens": 2}'
    sent = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    ) % len(body) + body
    with connect(rig.url) as connection, connection.makefile("rb") as answers:
        for _ in range(2):  # each request of a connection has the offer
            begin = 0
            for end in parts:
                connection.sendall(sent[begin:end])
                begin = end or 0
                time.sleep(0.02)  # a packet of its own
            assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
            headers = dict(line.split(b": ") for line in iter(answers.readline, b"\r\n"))
            assert json.loads(answers.read(int(headers[b"content-length"])))["usage"]["completion_tokens"] == 2
    assert not caplog.records


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_that_prefers_http2_is_served(rig: Any) -> None:
    command = ["curl", "-sS", "--http2", "--max-time", "30", f"{rig.url}/v1/completions", "-w", " %{http_version}"]
    sent = ["-H", "Content-Type: application/json", "-d", '{"prompt": "Once", "max_tokens": 2}']
    out = subprocess.run([*command, *sent], capture_output=True, text=True, timeout=60).stdout
    assert '"completion_tokens":2' in out and out.endswith(" 1.1")


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"\x16\x03\x01 a client that speaks TLS\r\n\r\n", 400, "bad_http"),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400, "bad_http"),
        (b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n", 405, "method_not_allowed"),
    ],
)
def test_what_is_no_request_gets_an_error_of_the_usual_form(rig: Any, sent: bytes, status: int, code: str) -> None:
    with connect(rig.url) as connection:
        connection.sendall(sent)
        head, _, body = b"".join(iter(lambda: connection.recv(1000), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"Connection: close" in head
    assert json.loads(body)["error"]["code"] == code


@pytest.fixture
def small() -> Iterator[HttpServer]:
    """A server whose answers are the headers of a request, a late one, and a large one."""

    async def headers(request: Request) -> Response:
        await request.body()
        return JSONResponse(dict(request.headers))

    async def late(request: Request) -> Response:
        await asyncio.sleep(0.3)
        return Response(b"late")

    async def large(request: Request) -> Response:
        return Response(bytes(1 << 26))

    server = HttpServer("127.0.0.1", 0)
    server.start(
        Starlette(
            routes=[
                Route("/headers", headers, methods=["POST"]),
                Route("/late", late),
                Route("/large", large),
            ]
        )
    )
    yield server
    server.stop()


@pytest.mark.parametrize("second", [b"CONNECT x:1 HTTP/1.1\r\n\r\n", b"GET /late HTTP/1.1\r\nNo header: x\r\n\r\n"])
def test_a_refusal_is_not_written_in_the_place_of_the_answer_before_it(small: HttpServer, second: bytes) -> None:
    with connect(small.url) as connection:
        connection.sendall(b"GET /late HTTP/1.1\r\nHost: x\r\n\r\n" + second)
        told = b"".join(iter(lambda: connection.recv(1000), b""))
    assert told.startswith(b"HTTP/1.1 200") and told.endswith(b"late") and told.count(b"HTTP/1.1") == 1


def test_a_head_without_end_is_refused(small: HttpServer) -> None:
    with connect(small.url) as connection:
        connection.sendall(b"GET /late HTTP/1.1\r\n")
        with contextlib.suppress(OSError):  # closed before all was sent
            for number in range(1000):
                connection.sendall(b"X-%d: %s\r\n" % (number, bytes(1000).replace(b"\0", b"x")))
        assert connection.recv(1000).startswith(b"HTTP/1.1 431")


def test_trailers_are_no_headers(small: HttpServer) -> None:
    head = b"POST /headers HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    with connect(small.url) as connection:
        connection.sendall(head + b"2\r\nab\r\n0\r\nX-Aurora-Tenant: other\r\n\r\n")
        told = b"".join(iter(lambda: connection.recv(1000), b""))
    assert b"transfer-encoding" in told and b"x-aurora-tenant" not in told


def test_a_client_that_reads_nothing_is_cut(small: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_UNREAD_S", 0.1)
    with connect(small.url) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert connection.recv(8) == b"HTTP/1.1"  # and nothing more
        assert small._uvicorn is not None
        connections = small._uvicorn.server_state.connections
        wait(lambda: not connections)
