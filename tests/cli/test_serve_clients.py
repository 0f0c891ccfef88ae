"""Clients of `aurora-rl flywheel`, next to the traffic that drives it."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from processes import wait

from aurora_rl.cli import main as cli
from aurora_rl.serving.async_engine import AsyncEngine
from aurora_rl.serving.http.server import HttpServer
from aurora_rl.telemetry.log import MetricsReader

FLYWHEEL = ["flywheel", "learner.spawn=false", "drafter.adaptive=false"]
TOKENS = 150  # of the client's request, which one of two slots decodes plainly while the other serves all the traffic


def of_the_command() -> bool:
    """Whether the command runs in this thread. Servers of other tests may go on in theirs."""
    return threading.current_thread() is threading.main_thread()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A client that asks before the first round of a run: `answer`, and what it saw of the server meanwhile."""
    run, start, step = SimpleNamespace(url="", answer=None, rounds=0), HttpServer.start, AsyncEngine.step
    run.before_round = lambda: None

    def started(server: HttpServer, app: Any) -> None:
        start(server, app)
        run.url = server.url

    def ask() -> dict[str, Any]:
        run.page = httpx.get(run.url).text
        run.metrics = httpx.get(f"{run.url}/metrics").text
        run.model = httpx.get(f"{run.url}/v1/models").json()["data"][0]["id"]
        chat = [{"role": "user", "content": "Go on."}]
        body = {"model": run.model, "messages": chat, "max_tokens": TOKENS, "speculative": False}
        return httpx.post(f"{run.url}/v1/chat/completions", json=body, timeout=60).json()

    def stepped(engine: AsyncEngine) -> bool:
        if not of_the_command():
            return step(engine)
        if run.answer is None:
            run.answer = pool.submit(ask)
            wait(lambda: engine.num_waiting or run.answer.done())
        run.rounds += 1
        run.before_round()
        return step(engine)

    monkeypatch.setattr(HttpServer, "start", started)
    monkeypatch.setattr(AsyncEngine, "step", stepped)
    with ThreadPoolExecutor(1) as pool:
        yield run


def check_answer(future: Future[dict[str, Any]]) -> None:
    answer = future.result(10)
    assert answer["usage"]["completion_tokens"] == TOKENS and answer["choices"][0]["finish_reason"] == "length"


def test_a_client_joins_the_rounds_and_is_no_part_of_the_traffic(
    run: SimpleNamespace, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*FLYWHEEL, *arguments, "http.port=0", "http.served_model_name=small"]) == 0
    assert run.model == "small"
    check_answer(run.answer)  # completed, though the traffic had ended before
    assert "<html" in run.page and "aurora_num_requests_running" in run.metrics
    told = capsys.readouterr().out
    assert f"listening at {run.url}/v1 · live page at {run.url}/" in told and "7 (0 failed, 1 of clients)" in told

    figures = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (figures["requests"], figures["client_requests"], figures["failed"]) == (7, 1, 0)
    assert figures["dropped_trajectories"] == 7  # learned from like any other, if there were a learner
    events = list(MetricsReader(tmp_path / "run" / "metrics.jsonl"))
    (begin,) = (event for event in events if event["event"] == "begin")
    assert (begin["traffic"], begin["unseen"]) == (6, 5)
    requests = [event for event in events if event["event"] == "request"]
    assert sorted(event["request"] for event in requests) == list(range(7)) and requests[-1]["request"] == 6
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert sorted(answer["request"] for answer in answers) == list(range(6))
    with pytest.raises(httpx.ConnectError):
        httpx.get(run.url)


def test_an_end_in_the_middle_completes_what_a_client_has_asked_and_no_traffic(
    run: SimpleNamespace, arguments: list[str], tmp_path: Path
) -> None:
    run.before_round = lambda: run.rounds == 12 and signal.raise_signal(signal.SIGINT)
    assert cli.main([*FLYWHEEL, *arguments, "http.port=0"]) == 130
    check_answer(run.answer)
    figures = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert figures["client_requests"] == 1 and figures["requests"] < 7


def test_a_client_of_an_engine_that_fails_hears_that_it_is_dead(run: SimpleNamespace, arguments: list[str]) -> None:
    def fails() -> None:
        if run.rounds == 12:
            raise RuntimeError("a bug")

    run.before_round = fails
    assert cli.main([*FLYWHEEL, *arguments, "http.port=0"]) == 1
    error = run.answer.result(10)["error"]
    assert error["code"] == "engine_dead" and error["message"].startswith("a fault has ended the engine")


def test_a_port_in_use_is_told_before_anything_begins(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main([*FLYWHEEL, *arguments, f"http.port={port}"]) == 75  # it may pass
    (line,) = capsys.readouterr().err.splitlines()
    assert f"http.port={port}: Address already in use" in line and line.endswith("http.port=null opens none")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("pairs", [["max_new_tokens=250"], ["max_new_tokens=8", "drafter.adaptive=true"]])
def test_clients_are_served_whatever_becomes_of_prompts_that_nobody_serves(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pairs: list[str]
) -> None:
    """The built-in traffic shapes a vocabulary alone: its budgets do not count, and a template may refuse it."""

    def refused(*args: object) -> list[int]:
        raise ValueError("no roles here")

    if "drafter.adaptive=true" in pairs:
        monkeypatch.setattr("aurora_rl.serving.requests.encode_chat", refused)
    wait_for_clients = AsyncEngine.wait

    def end(engine: AsyncEngine, seconds: float) -> None:
        if of_the_command():
            signal.raise_signal(signal.SIGTERM)
        else:
            wait_for_clients(engine, seconds)

    monkeypatch.setattr(AsyncEngine, "wait", end)
    alone = ["serve", "learner.spawn=false", "drafter.adaptive=false", "drafter.depth=1"]
    assert cli.main([*alone, *arguments, "http.port=0", *pairs]) == 0
    assert "listening at" in capsys.readouterr().out
