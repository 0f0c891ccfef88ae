"""What cannot be served is refused by name, in OpenAI's form, and alone."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_rl.workload.request_fields import HARMLESS, NEUTRAL

CHAT: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def http(rig: Any) -> Any:
    with httpx.Client(base_url=rig.url, timeout=30) as client:
        yield client


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert error.keys() == {"message", "type", "param", "code"} and error["message"] and error["code"]
    return error


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("field", NEUTRAL)
def test_what_is_not_supported_is_refused_unless_it_is_neutral(http: httpx.Client, path: str, field: str) -> None:
    wrong: Any = {"type": "json_object"} if field == "response_format" else [{"type": "function"}]
    body: dict[str, Any] = {"messages": CHAT} if "chat" in path else {"prompt": "a"}
    error = refused(http.post(path, json=body | {"max_tokens": 1, field: wrong}))
    assert error["param"] == field and error["code"] == "unsupported_field"
    assert error["message"].startswith(f"{field} is not supported")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_neutral_and_harmless_fields_are_taken(http: httpx.Client, path: str) -> None:
    body: dict[str, Any] = {"messages": CHAT} if "chat" in path else {"prompt": "a"}
    more = {name: values[0] if values else None for name, values in NEUTRAL.items()}
    assert http.post(path, json=body | more | {"max_tokens": 1}).status_code == 200
    nothing = dict.fromkeys([*NEUTRAL, *HARMLESS, "stop", "seed", "n", "stream", "logprobs", "temperature", "model"])
    assert http.post(path, json=body | nothing | {"max_tokens": 1}).status_code == 200
    assert http.post(path, json=body | dict.fromkeys(HARMLESS, "x") | {"max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": "a", "temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"prompt": "a", "nonsense": 1}, "nonsense", "unknown field 'nonsense'"),
        ({}, "prompt", "prompt is missing"),
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": []}, "prompt", "give a string"),
        ({"prompt": ["a", 3]}, "prompt", "give a string"),
        ({"prompt": [[3], []]}, "prompt", "give a string"),
        ({"prompt": [True]}, "prompt", "give a string"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": [3, 300]}, "prompt", "token 300 is outside of the model's vocabulary, 0..299"),
        ({"prompt": [-1]}, "prompt", "token -1 is outside"),
        ({"prompt": [10**30]}, "prompt", "is outside"),
        ({"prompt": "x" * 512, "max_tokens": None}, "prompt", "holds 512 tokens: the prompt has 512; shorten"),
        ({"prompt": "x" * 500, "max_tokens": 13}, "prompt", "max_tokens=13 asks for that many more"),
        ({"prompt": "a", "n": 9}, "n", "n=9 choices are more than http.max_waiting=8 completions"),
        ({"prompt": ["a", "b"], "n": 5}, "prompt", "2 prompts of n=5 choices are more than"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ({"prompt": "a", "max_tokens": "9"}, "max_tokens", "give an integer"),
        ({"prompt": "a", "max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens", "differ"),
        ({"prompt": "a", "max_completion_tokens": 600}, "prompt", "or lower max_completion_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature", "temperature is -1"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "give a number"),
        ({"prompt": "a", "temperature": 10**400}, "temperature", ""),
        ({"prompt": "a", "top_p": 0}, "top_p", "top_p is 0"),
        ({"prompt": "a", "top_k": -2}, "top_k", "top_k is -2"),
        ({"prompt": "a", "min_p": 1.5}, "min_p", "min_p is 1.5; give a number with 0 <= min_p <= 1"),
        ({"prompt": "a", "seed": 2**63}, "seed", "-2**63 <= seed < 2**63"),
        ({"prompt": "a", "seed": 1.5}, "seed", "give an integer"),
        ({"prompt": "a", "n": 0}, "n", "n is 0; give an integer >= 1 and <= 128"),
        ({"prompt": ["a"] * 9}, "prompt", "http.max_waiting=8"),
        ({"prompt": "a", "stop": ""}, "stop", "not empty"),
        ({"prompt": "a", "stop": ["a", 3]}, "stop", "not empty"),
        ({"prompt": "a", "stop": ["a"] * 17}, "stop", "at most 16"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "logprobs is 21"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "give an integer"),
        ({"prompt": "a", "stream": "yes"}, "stream", 'stream is "yes"; give true or false'),
        ({"prompt": [True, None]}, "prompt", "prompt is [true, null]; give a string"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", "max_tokens is true; give an integer"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
        ({"prompt": [3], "stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "1"),
        ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        ({"prompt": "a", "speculative": 1}, "speculative", "give true or false"),
        ({"prompt": "a", "learn": "no"}, "learn", "give true or false"),
        ({"prompt": "a", "cache_salt": 3}, "cache_salt", "cache_salt is 3; give a string of 1 to 128 characters"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt", "give a string of 1 to 128"),
        ({"prompt": "a", "cache_salt": "x" * 129}, "cache_salt", "give a string of 1 to 128"),
        ({"messages": CHAT, "cache_salt": "a/b"}, "cache_salt", "none of them @, /, \\ or NUL"),
        ({"messages": CHAT, "cache_salt": "\0"}, "cache_salt", "none of them @, /, \\ or NUL"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "Hi"}, "messages", "give a list"),
        ({"messages": ["Hi"]}, "messages[0]", "give an object"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role", "is missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [*CHAT, {"role": "user", "content": None}]}, "messages[1].content", "is missing"),
        ({"messages": [{"role": "boss", "content": "Hi"}]}, "messages[0].role", "give one of system, developer"),
        ({"messages": [{"role": ["a"], "content": "Hi"}]}, "messages[0].role", "give one of"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].role", "as tools are not"),
        ({"messages": [*CHAT, {"role": "user", "content": 3}]}, "messages[1].content", "give a string"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]", 'give {"type": "text"'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            'is "image_url"; give parts of type ',
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]", "string in 'text'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls",
            "not supported",
        ),
        ({"messages": CHAT, "top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
        ({"messages": CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21"),
        ({"messages": CHAT, "logprobs": 1}, "logprobs", "give true or false"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "shorten the prompt"),
        ({"messages": [*CHAT, {"role": "user", "content": "x" * 9000}]}, "messages", "a prompt of 9002 characters"),
        ({"prompt": ["a", "x" * 9000]}, "prompt", "a prompt of 9000 characters"),
        ({"messages": CHAT, "max_completion_tokens": 600}, "messages", "max_completion_tokens=600"),
        ({"messages": CHAT, "max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens", "differ"),
        ({"messages": CHAT, "ignore_eos": 1}, "ignore_eos", "give true or false"),
        ({"messages": [{"role": "user", "content": "Hi", "name": 3}]}, "messages[0].name", "give a string"),
        ({"messages": CHAT, "prompt": "a"}, "prompt", "unknown field"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(http: httpx.Client, body: Any, param: str, says: str) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    error = refused(http.post(path, json=body))
    assert error["param"] == param and says in error["message"], error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (rb'{"prompt": "\ud800"}', "not valid JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "finite number"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not valid JSON: an integer has too many digits"),
        (b"[1]", "must be a JSON object, got [1]"),
        (b'"a"', 'must be a JSON object, got "a"'),
        (b"null", "must be a JSON object, got null"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_bodies_that_are_no_object_of_json_are_refused(http: httpx.Client, data: bytes, says: str) -> None:
    answer = http.post("/v1/completions", content=data, headers={"Content-Type": "application/json"})
    assert says in refused(answer)["message"]


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="presence_penalty is not supported") as caught:
        client.chat.completions.create(model="tiny/model", messages=CHAT, presence_penalty=1.0)
    assert caught.value.param == "presence_penalty" and caught.value.code == "unsupported_field"
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-4' does not exist") as missing:
        client.chat.completions.create(model="gpt-4", messages=CHAT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("GET", "/v1/nothing", {}, 404, "not_found"),
        ("POST", "/v1/models/", {}, 405, "method_not_allowed"),
        ("GET", "/v1/chat/completions", {}, 405, "method_not_allowed"),
        ("DELETE", "/health", {}, 405, "method_not_allowed"),
        ("POST", "/v1/completions", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST", "/tokenize", {}, 415, "unsupported_media_type"),
    ],
)
def test_paths_methods_and_types_are_refused_in_the_same_form(
    http: httpx.Client, method: str, path: str, headers: dict[str, str], status: int, code: str
) -> None:
    assert refused(http.request(method, path, headers=headers), status)["code"] == code


def test_headers_that_are_no_switch_are_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a"}, headers={"X-Aurora-Learn": "maybe"})
    assert "x-aurora-learn is 'maybe'; give true or false" in refused(answer)["message"]


def test_headers_that_name_no_tenant_or_several_are_refused(http: httpx.Client) -> None:
    for names, message in ((["a b"], "X-Aurora-Tenant: the tenant is 'a b'; give 1 to 128"), (["a", "b"], "2 times")):
        headers = [("X-Aurora-Tenant", name) for name in names]
        assert message in refused(http.post("/v1/completions", json={"prompt": "a"}, headers=headers))["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": CHAT}),
        ("/tokenize", {"prompt": "a", "tools": [3]}),
        ("/tokenize", {"prompt": "a", "return_token_strs": "yes"}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [300]}),
        ("/detokenize", {"tokens": [2**70]}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {"tokens": [True]}),
        ("/detokenize", {"tokens": [1], "add_special_tokens": True}),
    ],
)
def test_tokenize_and_detokenize_refuse_too(http: httpx.Client, path: str, body: Any) -> None:
    refused(http.post(path, json=body))


def test_a_template_that_refuses_is_told(rig: Any, http: httpx.Client) -> None:
    template, rig.tokenizer.chat_template = rig.tokenizer.chat_template, "{{ raise_exception('users only') }}"
    try:
        error = refused(http.post("/v1/chat/completions", json={"messages": CHAT}))
        assert "chat template of model 'tiny/model' refuses the conversation: users only" in error["message"]
        rig.tokenizer.chat_template = "{{ messages[5].content }}"
        assert "refuses the conversation" in refused(http.post("/tokenize", json={"messages": CHAT}))["message"]
    finally:
        rig.tokenizer.chat_template = template


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(-2, 5), st.floats(), st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "include_usage", "x"]), inner, max_size=3),
    ),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": st.text(max_size=5) | values}
    ),
    max_size=3,
)
FIELDS = [
    *("model", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n"),
    "speculative",
    *("learn", "logprobs", "top_logprobs", "max_completion_tokens", "user", "tools", "logit_bias", "x", "prompt"),
]
bodies = st.one_of(
    values,
    st.builds(
        lambda base, more: {**more, **base},
        st.fixed_dictionaries({"max_tokens": st.just(2) | values}, optional={"messages": messages, "prompt": values}),
        st.dictionaries(st.sampled_from(FIELDS), values, max_size=3),
    ),
)
PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]


@given(path=st.sampled_from(PATHS), body=bodies, cut=st.integers(0, 400))
@settings(max_examples=120, deadline=None)
def test_whatever_is_sent_is_answered_or_refused(http: httpx.Client, path: str, body: Any, cut: int) -> None:
    data = json.dumps(body).encode()
    if cut < 40:
        data = data[:cut]
    answer = http.post(path, content=data, headers={"Content-Type": "application/json"})
    if answer.status_code != 200:
        refused(answer, answer.status_code)
        assert answer.status_code in (400, 404)
