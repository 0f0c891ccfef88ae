"""Fields of requests: honoured, and judged alike in a body and in a line of a traffic file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from aurora_rl.models.loading import encode_chat
from aurora_rl.workload.request_fields import HARMLESS, NEUTRAL, FieldError
from aurora_rl.workload.traffic import TrafficError, read_jsonl

CHAT: Any = [{"role": "user", "content": "Hi"}]


def said(content: Any, role: Any = "user", **more: Any) -> dict[str, Any]:
    return {"messages": [*CHAT, {"role": role, "content": content, **more}]}


HONOURED: list[dict[str, Any]] = [
    *({"temperature": value} for value in (0, 0.5, None)),
    *({"top_k": value} for value in (-1, 0, 5)),
    *({"min_p": value} for value in (0, 0.1, 1)),
    *({"seed": value} for value in (-1, -(2**63), 2**63 - 1)),
    *({"stop": value} for value in ("a", [], ["a"] * 16)),
    {"max_tokens": 2, "max_completion_tokens": 2},
    *({"ignore_eos": value} for value in (True, False)),
    *({name: False} for name in ("speculative", "learn", "stream", "logprobs", "store")),
    {"model": "tiny/model"}, {"n": 1}, {"nonsense": None}, {"frequency_penalty": 0.0},
    said("a", "assistant", metadata=None, options=None),  # as Gradio resends an answer
    said([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), said("a", "developer"), said("a", name="me"),
    said("a", "assistant", tool_calls=[], refusal=None),
    dict.fromkeys(HARMLESS, "x"), dict.fromkeys(NEUTRAL),
    {name: values[0] for name, values in NEUTRAL.items() if values},
]  # fmt: skip
REFUSED: list[dict[str, Any]] = [
    *({"temperature": value} for value in (-1, "hot", True)), {"top_p": 0}, {"top_p": 1.5},
    *({"top_k": value} for value in (-2, 1.5, True)),
    *({"min_p": value} for value in (-0.1, 1.1, "low", True)),
    *({"seed": value} for value in (2**63, -(2**63) - 1, 1.0)),
    *({"stop": value} for value in ("", [""], {}, {"a": 1}, ["a"] * 17, 3)),
    *({"max_tokens": value} for value in (0, 1.5, "9", True)),
    *({"max_completion_tokens": value} for value in (0, True)),
    {"max_tokens": 2, "max_completion_tokens": 3},
    *({name: 1} for name in ("ignore_eos", "speculative", "learn", "model")),
    {"model": "gpt-4"},
    {"frequency_penalty": False}, {"echo": 0}, {"best_of": True}, {"store": True},
    {"tools": [{"type": "function"}]}, {"guided_json": {}}, {"bad_words": ["a"]},
    said([3]), said([{"type": "image_url", "image_url": {"url": "x"}}]), said([{"type": "text"}]), said(3), said(None),
    said("a", "tool"), said("a", "boss"), said("a", ["user"]), said("a", name=3), said("a", age=3),
    said("a", "assistant", tool_calls=[{"id": "1"}]),
    {"messages": []}, {"messages": None}, {"messages": ["Hi"]},
]  # fmt: skip


def by_http(client: httpx.Client, fields: dict[str, Any]) -> str | None:
    """The field that the server refuses; None if it answers."""
    answer = client.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1, **fields})
    if answer.status_code == 200:
        return None
    assert answer.status_code == (404 if fields == {"model": "gpt-4"} else 400), answer.text
    return answer.json()["error"]["param"]


def by_file(folder: Path, fields: dict[str, Any]) -> str | None:
    """The field for which a line is refused; None if it is read."""
    path = folder / "requests.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "max_tokens": 1, **fields}))
    try:
        read_jsonl(path, model="tiny/model")
    except TrafficError as error:
        assert isinstance(error.__cause__, FieldError), error
        return error.__cause__.param
    return None


@pytest.mark.parametrize(("table", "honoured"), [(HONOURED, True), (REFUSED, False)])
def test_a_line_is_judged_as_a_body_is(rig: Any, tmp_path: Path, table: list[dict[str, Any]], honoured: bool) -> None:
    with httpx.Client(base_url=rig.url, timeout=30) as client:
        judged = [(fields, by_http(client, fields), by_file(tmp_path, fields)) for fields in table]
    assert [each for each in judged if each[1] != each[2] or (each[1] is None) != honoured] == []


def test_a_name_goes_to_the_chat_template(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rig.tokenizer,
        "chat_template",
        "{% for m in messages %}{{ m.name | default('nobody') }}:{{ m.content }};{% endfor %}",
    )
    messages = [{"role": "user", "content": "Hi", "name": "Ann"}, *CHAT]
    tokens = httpx.post(f"{rig.url}/tokenize", json={"messages": messages}).json()["tokens"]
    assert rig.tokenizer.decode(tokens) == "Ann:Hi;nobody:Hi;"
    answer = httpx.post(f"{rig.url}/v1/chat/completions", json={"messages": messages, "max_tokens": 1}, timeout=30)
    assert answer.json()["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize("speculative", [True, False])
def test_a_text_goes_on_after_its_end(
    rig: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, speculative: bool
) -> None:
    prompt = encode_chat(rig.tokenizer, CHAT)
    monkeypatch.setattr(rig, "stop_tokens", ())
    truth = rig.plain(prompt, 24)
    end = truth[5]
    monkeypatch.setattr(rig.env, "_stop_tokens", torch.tensor([end]))

    def ask(**more: Any) -> Any:
        body = {"model": "tiny/model", "messages": CHAT, "max_tokens": 24, "logprobs": True}
        return client.chat.completions.create(**body, extra_body={"speculative": speculative, **more}).choices[0]

    ended, whole = ask(), ask(ignore_eos=True)
    assert ended.finish_reason == "stop" and len(ended.logprobs.content) == truth.index(end) + 1
    assert whole.finish_reason == "length" and whole.message.content == rig.tokenizer.decode(
        truth, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert len(whole.logprobs.content) == 24


def test_an_operators_budget_counts_where_a_request_names_none(rig: Any) -> None:
    def tokens(url: str, path: str, body: dict[str, Any]) -> int:
        answer = httpx.post(f"{url}{path}", json={"ignore_eos": True, **body}, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["completion_tokens"]

    url = rig.serve(max_tokens=5)
    chat, text = "/v1/chat/completions", "/v1/completions"
    assert tokens(url, chat, {"messages": CHAT}) == tokens(url, text, {"prompt": "a"}) == 5
    assert tokens(url, text, {"prompt": "a", "max_tokens": None}) == 5
    assert (
        tokens(url, chat, {"messages": CHAT, "max_tokens": 7})
        == tokens(url, text, {"prompt": "a", "max_tokens": 7})
        == 7
    )
    assert tokens(url, text, {"prompt": "x" * 509}) == 3  # what the context leaves
    assert tokens(rig.url, text, {"prompt": "a"}) == 16 and tokens(rig.url, text, {"prompt": "x" * 509}) == 3
