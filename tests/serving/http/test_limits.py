"""Keys, bounds of size, time and queue, clients that leave, and an engine that dies."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from processes import wait

from aurora_rl.serving.http import front
from aurora_rl.serving.http import server as http_server
from aurora_rl.serving.http.keys import ENVIRONMENT, read_api_keys
from aurora_rl.serving.http.prompts import Encoder
from aurora_rl.serving.http.schemas import Tokenize
from aurora_rl.serving.http.server import HttpServer
from aurora_rl.telemetry.prometheus import Exporter

LONG = {"prompt": "Once", "max_tokens": 500, "stop": ["never there"]}


@pytest.fixture
def slow(rig: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine, idle, with rounds so slow that a long request lasts for seconds."""
    assert rig.idle()
    verify = rig.env.engine.verify

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return verify(*args, **kwargs)

    monkeypatch.setattr(rig.env.engine, "verify", slowly)
    yield rig
    assert rig.idle(2.0)  # whatever a test leaves, it frees its slots


@contextlib.contextmanager
def left_open(url: str, body: dict[str, Any]) -> Any:
    """A request on a connection of its own, which closes it when it is left."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + data)
        yield connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(slow: Any, stream: bool) -> None:
    before = len(slow.learned)
    with left_open(slow.url, LONG | {"stream": stream, "n": 4}) as connection:
        wait(lambda: slow.clients.num_running == 2)
        if stream:
            assert connection.recv(10) == b"HTTP/1.1 2"
    assert slow.idle(2.0)
    assert len(slow.learned) == before  # nothing was completed


def test_a_waiting_client_that_leaves_is_not_served(slow: Any) -> None:
    with left_open(slow.url, LONG | {"n": 2}):
        wait(lambda: slow.clients.num_running == 2)
        with left_open(slow.url, LONG):
            wait(lambda: slow.clients.num_waiting == 1)
        wait(lambda: slow.clients.num_waiting == 0)
        assert slow.clients.num_running == 2
    assert slow.idle(2.0)


def test_the_wait_of_a_client_that_leaves_the_queue_is_observed(slow: Any) -> None:
    def observed() -> int:
        lines = slow.metrics.expose({}).decode().splitlines()
        name = "aurora_request_queue_time_seconds_count"
        return next(round(float(line.split()[1])) for line in lines if line.startswith(name))

    before = observed()
    with left_open(slow.url, LONG | {"n": 2}):
        wait(lambda: observed() == before + 2)  # with their first tokens
        with left_open(slow.url, LONG):
            wait(lambda: slow.clients.num_waiting == 1)
        wait(lambda: observed() == before + 3)
    assert slow.idle(2.0)


def test_an_async_client_that_stops_reading_frees_its_slot(slow: Any) -> None:
    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{slow.url}/v1", api_key="none") as client:
            stream = await client.completions.create(
                model="tiny/model", prompt="Once", max_tokens=500, stop=["never there"], stream=True
            )
            async for _ in stream:
                await stream.close()
                break

    asyncio.run(leave())
    assert slow.idle(2.0)


def test_a_full_queue_asks_to_come_again(slow: Any) -> None:
    with contextlib.ExitStack() as clients:
        for n, waiting in ((8, 6), (2, 8)):
            clients.enter_context(left_open(slow.url, LONG | {"n": n}))
            wait(lambda: slow.clients.num_waiting == waiting)  # noqa: B023
        for stream in (False, True):
            answer = httpx.post(f"{slow.url}/v1/completions", json={"prompt": "a", "stream": stream})
            assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "queue_full"
        with (
            openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.RateLimitError, match="8 requests wait already"),
        ):
            client.completions.create(model="tiny/model", prompt="a")
        assert httpx.get(f"{slow.url}/health").status_code == 200
    assert slow.idle(2.0)


def test_a_busy_server_is_in_good_health(slow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_HEALTH_S", 2.0)
    with contextlib.ExitStack() as clients:
        clients.enter_context(left_open(slow.url, LONG | {"n": 8}))
        wait(lambda: slow.clients.num_waiting == 6)
        assert httpx.get(f"{slow.url}/health_generate", timeout=30).status_code == 200  # while its own token waits
        wait(lambda: slow.clients.num_waiting == 6)  # and is given up
        clients.enter_context(left_open(slow.url, LONG | {"n": 2}))
        wait(lambda: slow.clients.num_waiting == 8)
        assert httpx.get(f"{slow.url}/health_generate", timeout=30).status_code == 200  # nor is there room for it
        began, verify = threading.Event(), slow.env.engine.verify

        def stuck(*args: Any, **kwargs: Any) -> Any:
            began.set()
            time.sleep(3.0)
            return verify(*args, **kwargs)

        monkeypatch.setattr(slow.env.engine, "verify", stuck)
        assert began.wait(10)
        monkeypatch.setattr(slow.env.engine, "verify", verify)
        answer = httpx.get(f"{slow.url}/health_generate", timeout=30)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_token"
        assert "within 2 s" in answer.json()["error"]["message"]
    assert slow.idle(4.0)


def test_part_of_a_request_that_finds_the_queue_full_is_cancelled(slow: Any) -> None:
    with left_open(slow.url, LONG | {"n": 8}):
        wait(lambda: slow.clients.num_waiting == 6)
        assert httpx.post(f"{slow.url}/v1/completions", json=LONG | {"n": 4}).status_code == 429
        wait(lambda: slow.clients.num_waiting == 6)
    assert slow.idle(2.0)


def test_time_is_bounded(slow: Any) -> None:
    url = slow.serve(timeout=0.2)
    answer = httpx.post(f"{url}/v1/completions", json=LONG, timeout=30)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    assert "http.timeout" in answer.json()["error"]["message"]
    assert slow.idle(2.0)


def test_a_stream_that_runs_out_of_time_says_so(slow: Any) -> None:
    url = slow.serve(timeout=0.5)
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="http.timeout"),
    ):
        for _ in client.completions.create(
            model="tiny/model", prompt="Once", max_tokens=500, stop=["never there"], stream=True
        ):
            pass
    assert slow.idle(2.0)


def test_a_body_that_does_not_come_is_given_up(rig: Any) -> None:
    host, port = rig.serve(timeout=0.2).removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


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
    answer = httpx.post(f"{slow.serve()}/v1/completions", json=LONG | {"max_tokens": 40}, timeout=30)
    assert answer.status_code == 200 and answer.elapsed.total_seconds() > 0.2


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
def test_a_long_text_that_is_counted_makes_no_other_request_wait(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on, tokenize = threading.Event(), threading.Event(), Encoder.tokenize

    def slowly(encoder: Encoder, body: Tokenize) -> list[int]:
        began.set()
        assert go_on.wait(30)
        return tokenize(encoder, body)

    monkeypatch.setattr(Encoder, "tokenize", slowly)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        counted = pool.submit(httpx.post, f"{rig.url}/tokenize", json={"prompt": "x" * 600_000}, timeout=60)
        try:
            assert began.wait(30)
            answer = httpx.post(f"{rig.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=10)
            assert answer.status_code == 200 and not counted.done()
        finally:
            go_on.set()
        assert counted.result().json()["count"] == 600_000  # as in vLLM, more than the context holds


def test_curl_reads_that_its_body_is_too_large(rig: Any, tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(b"x" * 3_000_000)
    command = ["curl", "-s", "--max-time", "30", f"{rig.url}/v1/completions", "-H", "Content-Type: application/json"]
    out = subprocess.run([*command, "--data-binary", f"@{tmp_path}/body"], capture_output=True, timeout=60, check=True)
    assert json.loads(out.stdout)["error"]["code"] == "request_too_large"


def test_keys_open_the_server(rig: Any) -> None:
    url = rig.serve(api_keys=["first", "größer"])
    body = {"prompt": "a", "max_tokens": 1}
    for sent in [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer second"}, {"Authorization": "first"}]:
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=sent)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for key in ("first", "größer"):
        sent = {"Authorization": b"bearer " + key.encode()}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=sent).status_code == 200
    for path in ("/v1/models", "/server_info", "/metrics", "/health_generate", "/v1/nothing"):
        assert httpx.get(f"{url}{path}").status_code == 401
    for path in ("/tokenize", "/detokenize"):
        assert httpx.post(f"{url}{path}", json={}).status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
            client.models.list()
        assert len(client.with_options(api_key="first").models.list().data) == 1


def test_a_wrong_key_is_counted(rig: Any) -> None:
    metrics = Exporter()
    url = rig.serve(api_keys=["key"], metrics=metrics)
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert httpx.post(f"{url}{path}", json={}).status_code == 401
    assert httpx.get(f"{url}/metrics").status_code == 401  # which asks for no completion
    assert b'aurora_request_failures_total{code="invalid_api_key"} 2.0' in metrics.expose({})


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\none\n\n  two \n")
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert read_api_keys(None) == [] and read_api_keys(file) == ["one", "two"]
    monkeypatch.setenv(ENVIRONMENT, "three, four\nfive")
    assert read_api_keys(None) == ["three", "four", "five"] and read_api_keys(file) == ["one", "two"]
    monkeypatch.setenv(ENVIRONMENT, " ")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT} holds no API key"):
        read_api_keys(None)
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no API key"):
        read_api_keys(file)
    with pytest.raises(ValueError, match="cannot read the API keys: .*absent"):
        read_api_keys(tmp_path / "absent")


def test_pages_of_other_origins_are_let_in_by_name_only(rig: Any) -> None:
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    more = {"Access-Control-Request-Headers": "authorization,content-type"}
    shut = httpx.options(f"{rig.url}/v1/completions", headers=asked | more)
    assert shut.status_code == 405 and "access-control-allow-origin" not in shut.headers
    url = rig.serve(cors_origins=["https://chat.example"], api_keys=["key"])
    let_in = httpx.options(f"{url}/v1/completions", headers=asked | more)
    assert let_in.status_code == 200
    assert let_in.headers["access-control-allow-origin"] == "https://chat.example"
    assert "authorization" in let_in.headers["access-control-allow-headers"]
    stranger = httpx.options(f"{url}/v1/completions", headers=asked | more | {"Origin": "https://evil.example"})
    assert stranger.status_code == 400
    refused = httpx.get(f"{url}/v1/models", headers={"Origin": "https://chat.example"})
    assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers


def test_an_engine_that_dies_is_told_by_every_path(make_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig()

    def broken(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with concurrent.futures.ThreadPoolExecutor(1) as pool, httpx.Client(base_url=rig.url, timeout=30) as http:
        stream = pool.submit(http.post, "/v1/completions", json=LONG | {"stream": True})
        wait(lambda: rig.clients.num_running == 1)
        time.sleep(0.1)
        monkeypatch.setattr(rig.env.engine, "verify", broken)
        answer = stream.result(30)
        if answer.status_code == 200:  # it had begun
            assert "out of memory" in answer.text and answer.text.endswith("data: [DONE]\n\n")
        for status, answer in [
            (503, http.post("/v1/completions", json={"prompt": "a"})),
            (503, http.post("/v1/completions", json={"prompt": "a", "stream": True})),
            (503, http.get("/health")),
            (503, http.get("/health_generate")),
            (200, http.get("/v1/models")),
        ]:
            assert answer.status_code == status
            assert status == 200 or answer.json()["error"]["code"] == "engine_dead"


def test_a_port_that_is_in_use_is_told_before_anything_is_served() -> None:
    first = HttpServer("127.0.0.1", 0)
    try:
        first._socket.listen()
        port = int(first.url.rpartition(":")[2])
        with pytest.raises(ValueError, match=f"cannot listen at http.host=127.0.0.1, http.port={port}: .*in use"):
            HttpServer("127.0.0.1", port)
    finally:
        first.stop()


def test_an_error_of_the_program_has_the_same_form(rig: Any) -> None:
    failed = httpx.get(f"{rig.serve(drafter_version=lambda: 1 // 0)}/server_info")
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "internal_error"


def test_without_the_extra_the_import_names_it() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; import aurora_rl.serving.http"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'aurora-rl[serve]'" in out.stderr.splitlines()[-1]
