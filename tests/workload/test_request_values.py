"""Values of request fields: what each may be, and how the others are named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aurora_rl.sampling_params import SamplingParams
from aurora_rl.workload.request_fields import FieldError
from aurora_rl.workload.request_values import chat_messages, parse_json, sampling_fields


def test_what_a_request_leaves_out_or_says_null_to_is_not_there() -> None:
    assert sampling_fields({"temperature": None, "max_tokens": None, "n": 3}) == {}
    full = {"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 2**63 - 1, "stop": ["a"]}
    full["ignore_eos"] = True
    assert sampling_fields({**full, "max_tokens": 7}) == {**full, "max_tokens": 7}


def test_clients_words_become_ours() -> None:
    assert SamplingParams(**sampling_fields({"top_k": -1})) == SamplingParams(top_k=0)
    assert sampling_fields({"max_tokens": 3, "max_completion_tokens": 3}) == {"max_tokens": 3}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": "hot"}, "temperature", 'temperature is "hot"; give a number'),
        ({"temperature": True}, "temperature", "temperature is true; give a number"),
        ({"top_k": False}, "top_k", "top_k is false; give an integer"),
        ({"seed": {"a": [None, "\x9b"]}}, "seed", r'seed is {"a": [null, "\u009b"]}; give an integer'),
        ({"temperature": float("inf")}, "temperature", "give a finite number"),
        ({"top_k": -2}, "top_k", "top_k is -2; give an integer with 0 <= top_k"),
        ({"top_k": -1.0}, "top_k", "top_k is -1.0; give an integer"),
        ({"seed": -(2**63) - 1}, "seed", "-2**63 <= seed < 2**63"),
        ({"min_p": "low"}, "min_p", 'min_p is "low"; give a number'),
        ({"min_p": 2}, "min_p", "min_p is 2; give a number with 0 <= min_p <= 1"),
        ({"stop": {}}, "stop", "stop is {}; give a string, or a list of strings"),
        ({"stop": ["a", ""]}, "stop", 'stop has ""; give strings that are not empty'),
        ({"stop": ["a", True]}, "stop", "stop has true; give strings that are not empty"),
        ({"stop": ["a"] * 17}, "stop", "stop has 17 strings; give at most 16"),
        ({"stop": "x" * 1001}, "stop", "stop has a string of 1001 characters; give at most 1000"),
        ({"stop": ["a", "x" * 1001]}, "stop", "stop has a string of 1001 characters; give at most 1000"),
        ({"ignore_eos": 1}, "ignore_eos", "ignore_eos is 1; give true or false"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0; give an integer >= 1"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens", "differ; give one of them"),
        ({"temperature": [["x"] * 10_000] * 10}, "temperature", "give a number"),
    ],
)
def test_what_no_sampler_could_serve_is_named(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(FieldError) as caught:
        sampling_fields(fields)
    assert caught.value.param == param and says in str(caught.value) and len(str(caught.value)) < 300


def test_messages_are_texts_by_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    sent = [
        {"role": "developer", "content": "Be brief.", "name": "rules"},
        {"role": "user", "content": parts, "name": None},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": []},
    ]
    assert chat_messages(sent) == (
        {"role": "system", "content": "Be brief.", "name": "rules"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": ""},
    )


@pytest.mark.parametrize(
    ("messages", "param", "says"),
    [
        (None, "messages", "messages is missing"),
        ({}, "messages", "give a list with at least one message"),
        ([{"role": "user", "content": "Hi", "name": 3}], "messages[0].name", "name is 3; give a string"),
        ([{"role": "user", "content": "Hi", "age": 3}], "messages[0].age", "unknown field 'messages[0].age'"),
        ([{"role": "function", "content": "Hi"}], "messages[0].role", "not supported, as tools are not"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "messages[0].content[0]", "a string in 'text'"),
    ],
)
def test_what_no_template_could_take_is_named(messages: Any, param: str, says: str) -> None:
    with pytest.raises(FieldError) as caught:
        chat_messages(messages)
    assert caught.value.param == param and says in str(caught.value)


def test_a_value_is_read() -> None:
    value = {"a": ["é", 1, 2.5, None, True], "\U0001f600": "\\ud800"}
    assert parse_json(json.dumps(value).encode()) == parse_json(b"\xef\xbb\xbf" + json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "Expecting value at character 1"),
        (b'{"a": 1,\n]', "at character 10"),
        (b'"\xff"', "'utf-8' codec can't decode"),
        (b'{"a": -Infinity}', "-Infinity is not JSON; write a number or null"),
        (b"[" * 100_000, "nested too deeply"),
        (rb'"\udc00 "', r"a text has '\udc00', half a surrogate pair, which no tokenizer takes; remove it"),
    ],
)
def test_what_is_no_value_is_told(data: bytes, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_json(data)
    assert says in str(caught.value)
