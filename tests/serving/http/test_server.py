"""Connections are bounded in number and in silence, and a port in use is told."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from typing import Any

import httpx
import pytest
from processes import wait

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
        first._socket.listen()
        port = int(first.url.rpartition(":")[2])
        with pytest.raises(ValueError, match=f"cannot listen at http.host=127.0.0.1, http.port={port}: .*in use"):
            HttpServer("127.0.0.1", port)
    finally:
        first.stop()
