"""Bodies of requests are bounded in size and in time, before they are parsed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest


def test_a_body_that_does_not_come_is_given_up(rig: Any) -> None:
    host, port = rig.serve(timeout=0.2).removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_bodies_are_bounded_before_they_are_parsed(rig: Any) -> None:
    url = f"{rig.serve(max_body=1000)}/v1/completions"
    fits = {"prompt": "a", "max_tokens": 1, "user": "x" * 900}
    assert httpx.post(url, json=fits).status_code == 200
    large = httpx.post(url, json=fits | {"user": "x" * 1000})
    assert large.status_code == 413 and "http.max_body" in large.json()["error"]["message"]

    def endless() -> Any:  # no length is declared
        for _ in range(50):
            yield b" " * 100

    answer = httpx.post(url, content=endless(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_reads_that_its_body_is_too_large(rig: Any, tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(b"x" * 3_000_000)
    command = ["curl", "-s", "--max-time", "30", f"{rig.url}/v1/completions", "-H", "Content-Type: application/json"]
    out = subprocess.run([*command, "--data-binary", f"@{tmp_path}/body"], capture_output=True, timeout=60, check=True)
    assert json.loads(out.stdout)["error"]["code"] == "request_too_large"
