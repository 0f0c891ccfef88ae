"""What an answer of SGLang says of its drafts, and what is noted of how long its client waited."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sglang_stand_in import ANSWER, BLOCK, CHAT, DETAILS, Upstream, post

from aurora_rl.serving.http.sglang_answer import SGLangAnswer

DRAFTING: dict[str, Any] = {"num_spec_tokens": lambda: 4, "drafter_version": lambda: 7}


def test_an_answer_says_what_became_of_its_drafts_as_the_embedded_engine_does(serve: Callable[..., str]) -> None:
    url = serve(**DRAFTING)
    assert post(url, {"do": "draft"}).json() == ANSWER | {"metrics": BLOCK}
    asked = post(url, {"do": "draft", "return_spec_tokens_details": True}).json()
    assert asked == ANSWER | {"sglext": {"spec_tokens_details": DETAILS}, "metrics": BLOCK}
    two = post(url, {"do": "draft", "n": 2}).json()["metrics"]["speculative_decoding"]
    assert (two["num_spec_steps"], two["num_draft_tokens"], two["mean_acceptance_length"]) == (8, 24, 2.5)
    assert "metrics" not in post(url, {}).json()  # SGLang says nothing


def test_an_answer_is_read_next_to_the_event_loop(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    threads, whole = [], SGLangAnswer.whole

    def read(answer: SGLangAnswer, content: bytes) -> bytes:
        threads.append(threading.current_thread().name)
        return whole(answer, content)

    monkeypatch.setattr(SGLangAnswer, "whole", read)
    assert post(serve(**DRAFTING), {"do": "draft"}).status_code == 200
    assert len(threads) == 1 and threads[0] != "http"


@pytest.mark.parametrize(("fields", "asks"), [
    ({"prompt": "a"}, True), ({"prompt": ["a"]}, True), ({"prompt": [5, 6]}, True),
    ({"prompt": ["a", "b"], "n": 2}, True), ({"prompt": ["a", "b"]}, False), ({"prompt": [[5], [6]], "n": 1}, False),
])  # fmt: skip
def test_sglang_is_asked_where_it_tells_about_every_choice(
    upstream: Upstream, serve: Callable[..., str], fields: dict[str, Any], asks: bool
) -> None:
    httpx.post(f"{serve()}/v1/completions", json=fields)
    assert json.loads(upstream.bodies[-1]) == {**fields, **({"return_spec_tokens_details": True} if asks else {})}


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_says_it_in_its_last_piece_and_has_no_piece_that_nobody_asked_for(
    serve: Callable[..., str], usage: bool
) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    *pieces, done, _ = post(serve(**DRAFTING), {"do": "draft", "stream": True, **options}).text.split("\n\n")
    said = [json.loads(piece.removeprefix("data: ")) for piece in pieces]
    assert done == "data: [DONE]"
    assert [piece.pop("metrics", None) for piece in said] == [None] * (len(said) - 1) + [BLOCK]
    assert [len(piece["choices"]) for piece in said] == [1, 1, 1] + [0] * usage
    assert said[2]["choices"][0]["finish_reason"] == "length" and ("usage" in said[-1]) == usage


def test_a_stream_is_passed_on_as_it_comes(serve: Callable[..., str]) -> None:
    with httpx.stream("POST", serve() + CHAT, json={"do": "stall", "stream": True}, timeout=10) as stream:
        assert '"content": "one"' in next(stream.iter_lines())


def test_events_may_come_in_any_pieces() -> None:
    last = {"choices": [{"index": 0, "text": "hällo", "finish_reason": "stop"}]}
    told = {"choices": [], "sglext": {"spec_tokens_details": DETAILS}}
    head = b": a comment\n\n"
    text = (
        head + b"".join(b"data: " + json.dumps(body).encode() + b"\n\n" for body in (last, told)) + b"data: [DONE]\n\n"
    )
    for size in (len(text), 1, 7):
        answer = SGLangAnswer({}, observe=lambda *wait: None, num_spec_tokens=4, drafter_version=lambda: 7)
        parts = [answer.feed(text[at : at + size]) for at in range(0, len(text), size)]
        comment, event, done, end = b"".join(parts).split(b"\n\n")
        assert json.loads(event.removeprefix(b"data: ")) == {**last, "metrics": BLOCK}
        assert (comment + b"\n\n", done, end, answer.end()) == (head, b"data: [DONE]", b"", b"")


def test_what_is_held_back_comes_before_what_goes_wrong() -> None:
    answer = SGLangAnswer({}, observe=lambda *wait: None, num_spec_tokens=4, drafter_version=lambda: 7)
    last = b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]}\n\n'
    error = b'data: {"error": {"message": "late"}}\n\n'
    assert (answer.feed(last), answer.feed(error)) == (b"", last + error)
    assert (answer.feed(last), answer.end(), answer.end()) == (b"", last, b"")


def test_metrics_say_how_long_clients_wait(serve: Callable[..., str]) -> None:
    url = serve(**DRAFTING)
    assert post(url, {"do": "draft"}).status_code == post(url, {"do": "draft", "stream": True}).status_code == 200
    assert post(url, {"do": "draft", "stream": True, "n": 2}).status_code == 200
    assert post(url, {"do": "refuse"}).status_code == 400
    text = httpx.get(f"{url}/metrics").text
    found = {
        name: float(value) for name, value in re.findall(r"^aurora_(\w+_seconds_(?:count|sum)) (\S+)$", text, re.M)
    }
    counts = {name.removesuffix("_seconds_count"): found[name] for name in found if name.endswith("count")}
    assert counts == {
        "e2e_request_latency": 3, "time_to_first_token": 2,  # of streams alone, and of the first choice
        "inter_token_latency": 1, "request_time_per_output_token": 1,  # of a stream of one choice
        "request_queue_time": 0, "swap_duration": 0,
    }  # fmt: skip
    # Ten of the eleven tokens came after the first.
    per_token = found["inter_token_latency_seconds_sum"] / 10
    assert found["request_time_per_output_token_seconds_sum"] == pytest.approx(per_token)
    assert 0 < found["time_to_first_token_seconds_sum"] < found["e2e_request_latency_seconds_sum"] < 60
