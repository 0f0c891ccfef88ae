"""Bounds of time and queue, clients that leave, and an engine that dies."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import socket
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from processes import wait

from aurora_rl.serving.http import front
from aurora_rl.serving.http.prompts import Encoder
from aurora_rl.serving.http.schemas import Tokenize

LONG = {"prompt": "Once", "max_tokens": 500, "stop": ["never there"]}


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


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": ""}] * 29_000}),
        ("completions", {"prompt": ["a long one " * 150, "the next"]}),
    ],
)
def test_what_has_no_room_is_refused_before_work_goes_into_it(
    rig: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    asked: list[object] = []

    def counted(self: Any, prompt: Any) -> list[int]:
        asked.append(prompt)
        return [1] * 100_000

    monkeypatch.setattr(Encoder, "_chat", counted)
    monkeypatch.setattr(Encoder, "_text", counted)
    answer = httpx.post(f"{rig.url}/v1/{path}", json={"max_tokens": 1, **body}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert asked == body.get("prompt", [])[:1]


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
    rig.clients.end()  # the server shuts down after it, and says still why
    assert httpx.get(f"{rig.url}/health").json()["error"]["code"] == "engine_dead"


def test_a_server_that_shuts_down_is_not_dead_and_completes_what_it_has(make_rig: Any) -> None:
    rig = make_rig()
    with httpx.Client(base_url=rig.url, timeout=30) as http:
        with http.stream("POST", "/v1/completions", json=LONG | {"max_tokens": 40, "stream": True}) as running:
            pieces = running.iter_lines()
            next(pieces)
            rig.clients.close()
            for answer in (http.post("/v1/completions", json={"prompt": "a"}), http.get("/health")):
                error = answer.json()["error"]
                assert (answer.status_code, error["type"], error["code"]) == (503, "server_error", "shutting_down")
                assert error["message"] == "the server is shutting down"
                assert answer.headers["retry-after"] == "5"  # OpenAI's clients ask again then
            assert list(pieces)[-2:] == ["data: [DONE]", ""] and running.status_code == 200
        assert 'aurora_request_failures_total{code="shutting_down"} 1.0' in http.get("/metrics").text
        answer = http.get("/health_generate")  # nothing runs any more that would deliver a token
        assert (answer.json()["error"]["code"], answer.headers["retry-after"]) == ("shutting_down", "5")
