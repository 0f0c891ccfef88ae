"""`aurora-rl serve`: clients over HTTP are learned from, and whatever ends does not take the others with it."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from http_clients import ask, ask_until, client
from processes import wait
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.faults
Start = Callable[..., Any]


def server_page(api: openai.OpenAI) -> dict[str, Any]:
    """What the live page shows, a status later."""
    url = api.base_url.join("/history")
    wait(lambda: httpx.get(url).json()["learner"]["state"] == "running")
    return httpx.get(url).json()


def scrape(api: openai.OpenAI) -> dict[str, float]:
    """Metrics without a label, by name."""
    text = httpx.get(str(api.base_url.join("/metrics")), timeout=30).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {sample.name: sample.value for sample in samples if not sample.labels}


def test_clients_are_served_and_learned_from_until_the_end(start: Start) -> None:
    server = start("serve", "http.port=0", "drafter.adaptive=true")
    api = client(server)
    first = ask(api, "Number 0?")
    assert first.usage.completion_tokens == 8  # max_new_tokens
    served = 1 + ask_until(server, api, lambda: server.events("swap"))
    later = ask(api, "Number 0?", max_tokens=8)
    assert later.choices[0].message.content == first.choices[0].message.content  # whatever drafts, the same text
    assert first.metrics["drafter_version"] == 0
    assert later.metrics["drafter_version"] >= server.events("swap")[0]["version"]
    told = server_page(api)
    assert told["requests"] > 0 and told["learner"]["state"] == "running" and told["gates"]["version"]
    assert told["swaps"]["version"][0] == server.events("swap")[0]["version"]

    wait(lambda: scrape(api)["aurora_generation_tokens_total"] == 8 * (served + 1), 30)
    found = scrape(api)
    assert found["aurora_swap_duration_seconds_count"] >= 1 and found["aurora_drafter_version"] >= 1
    assert found["aurora_learner_steps_total"] >= 1 and found["aurora_time_to_first_token_seconds_count"] == served + 1
    wait(lambda: scrape(api).get("aurora_learner_up") == 1, 30)

    server.interrupt()
    assert server.ended() == 0, server.text
    assert server.summary["requests"] == served + 1 and server.summary["failed"] == 0
    assert not server.children
    assert not (server.run / "answers.jsonl").exists()  # what clients ask is theirs


def test_what_a_dead_learner_missed_is_counted_and_what_waited_for_the_next_is_not(start: Start) -> None:
    server = start("serve", "http.port=0", "wire.queue=2")
    api = client(server)
    for number in range(2):  # a batch, and no more than waits for a learner that is just being connected
        ask(api, f"Number {number}?", max_tokens=8)
    server.wait_for("train")
    (pid,) = server.children
    os.kill(pid, signal.SIGKILL)
    server.wait_for("learner_died")
    for number in range(8):
        ask(api, f"Number {number}?", max_tokens=8)
    assert len(server.events("learner_ready")) == 1  # the next does not listen yet
    server.wait_for("learner_ready", 2)
    (again,) = server.events("learner_restarted")
    assert again["missed"] <= 6
    assert again["lost"] == 2 and not again["resumed"]  # what it had learned from was not saved
    server.interrupt()
    assert server.ended() == 0, server.text
    assert server.summary["dropped_by_reason"] == {"no_learner": 6, "learner_died": 2}
    told = f"{again['missed']} trajectories were dropped without one, and 2 were lost with the last"
    assert told in " ".join(server.text.split())


def test_a_learner_whose_folder_is_gone_ends_no_server(start: Start) -> None:
    server = start("serve", "http.port=0")
    api = client(server)
    (pid,) = server.children
    shutil.rmtree(server.run)
    os.kill(pid, signal.SIGKILL)
    wait(lambda: "the learner cannot be started again" in server.text)
    assert ask(api, "Still there?", max_tokens=8).usage.completion_tokens == 8
    server.interrupt()
    assert server.ended() == 0, server.text
    assert server.text.count("cannot be started again") == 1 and server.summary["requests"] == 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_chat_of_the_quickstart(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^curl .*", page, re.M)
    code = next(block for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "OpenAI(" in block)
    assert ".venv/bin/aurora-rl serve\n" in page
    server = start("serve", "http.port=0", "learner.spawn=false")
    url = str(client(server).base_url).removesuffix("/v1/")
    words = shlex.split(command.replace("http://127.0.0.1:8000", url))
    assert words[1].startswith(url)
    out = subprocess.run([*words, "-s", "--max-time", "60"], capture_output=True, timeout=90, check=True).stdout
    (choice,) = json.loads(out)["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] in ("length", "stop")
    names: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8000", url), names)
    names["client"].close()
    assert capsys.readouterr().out == f"{choice['message']['content']}\n"
    server.interrupt()
    assert server.ended() == 0, server.text


def test_an_end_in_the_middle_completes_what_was_asked(start: Start) -> None:
    server = start("serve", "http.port=0", "learner.spawn=false")
    api = client(server)
    url = str(api.base_url).rstrip("/")
    body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 40, "stream": True}
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in "".join(rest)
    assert server.ended() == 0, server.text


def test_silent_connections_take_no_descriptor_that_the_server_needs(start: Start) -> None:
    server = start("serve", "http.port=0", "learner.spawn=false")
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (200, 200))
    api = client(server)
    with ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(socket.create_connection((api.base_url.host, api.base_url.port), timeout=10))
        statuses = len(server.events("status"))
        server.wait_for("status", statuses + 1)
    wait(lambda: httpx.get(api.base_url.join("/health")).status_code == 200)
    assert ask(api, "Still there?", max_tokens=8).usage.completion_tokens == 8
    server.interrupt()
    assert server.ended() == 0, server.text
