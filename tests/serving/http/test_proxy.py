"""The front for SGLang, before a server of its own that stands where SGLang does."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from processes import wait
from sglang_stand_in import ANSWER, CHAT, WRONG, Upstream, post

from aurora_rl.envs.remote.plugin_server import PluginError

# ---- what goes on, and what comes back ------------------------------------------------------------------------------


def test_fields_and_bodies_go_on_and_the_answer_comes_back(upstream: Upstream, serve: Callable[..., str]) -> None:
    url, body = serve(), b'{ "model":"m", "temperature": 0.10, "unknown": [1e2], "cache_salt": "\\u00e4" }'
    asked = {**json.loads(body), "return_spec_tokens_details": True}
    for path in (CHAT, "/v1/completions", "/tokenize", "/detokenize"):
        answer = httpx.post(url + path, content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        assert (upstream.paths[-1], answer.json()) == (path, ANSWER)
        if path.startswith("/v1"):
            assert json.loads(upstream.bodies[-1]) == asked
        else:
            assert upstream.bodies[-1] == body


def test_an_unmodified_client_is_answered_whole_and_in_pieces(serve: Callable[..., str]) -> None:
    with openai.OpenAI(base_url=f"{serve()}/v1", api_key="none", max_retries=0, timeout=30) as client:
        asked: Any = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        assert client.chat.completions.create(**asked).choices[0].message.content == "hällo"
        stream = client.chat.completions.create(**asked, stream=True)
        assert [chunk.choices[0].delta.content for chunk in stream] == ["one", "two"]


@pytest.mark.parametrize(
    "fields",
    [
        *({"min_p": 0}, {"min_p": None}, {"min_p": 0.1, "temperature": 0}),
        {"frequency_penalty": 0.0, "presence_penalty": None, "repetition_penalty": 1, "min_tokens": 0},
    ],
)
def test_a_min_p_and_penalties_that_change_nothing_go_on(
    upstream: Upstream, serve: Callable[..., str], fields: Any
) -> None:
    assert post(serve(), fields).status_code == 200
    assert json.loads(upstream.bodies[-1]) == {"return_spec_tokens_details": True, **fields}


@pytest.mark.parametrize(
    ("fields", "headers", "expected"),
    [
        ({"learn": False}, {}, {"custom_params": {"aurora_rl": False}}),
        ({}, {"X-Aurora-Learn": "false"}, {"custom_params": {"aurora_rl": False}}),
        ({"learn": True}, {"X-Aurora-Learn": "false"}, {}),
        ({"learn": None, "speculative": True}, {}, {}),
        ({"learn": False, "custom_params": {"a": 1}}, {}, {"custom_params": {"a": 1, "aurora_rl": False}}),
        ({"learn": False, "custom_params": None}, {}, {"custom_params": {"aurora_rl": False}}),
        ({}, {"X-Aurora-Tenant": "out"}, {"cache_salt": "out@", "custom_params": {"aurora_rl": False}}),
        ({"cache_salt": "s"}, {"X-Aurora-Tenant": "in"}, {"cache_salt": "in@s"}),
        ({"cache_salt": ["s", None]}, {"X-Aurora-Tenant": "in"}, {"cache_salt": ["in@s", "in@"]}),
        ({"cache_salt": ["s", "in@s"]}, {}, {"cache_salt": ["s", "@in@s"]}),
    ],
)
def test_what_is_not_to_be_learned_says_so_in_sglangs_words(
    upstream: Upstream, serve: Callable[..., str], fields: Any, headers: Any, expected: Any
) -> None:
    assert post(serve(opt_out=["out"]), {"seed": 3, **fields}, **headers).status_code == 200
    assert json.loads(upstream.bodies[-1]) == {"seed": 3, "return_spec_tokens_details": True, **expected}


@pytest.mark.parametrize(
    ("fields", "headers", "param", "code"),
    [
        ({"speculative": False}, {}, "speculative", "unsupported_field"),
        ({}, {"X-Aurora-Speculative": "0"}, "speculative", "unsupported_field"),
        ({"min_p": 0.1}, {}, "min_p", "unsupported_field"),
        ({"min_p": 0.1, "temperature": 0.5}, {}, "min_p", "unsupported_field"),
        ({"frequency_penalty": 0.5, "temperature": 0}, {}, "frequency_penalty", "unsupported_field"),
        ({"presence_penalty": -1}, {}, "presence_penalty", "unsupported_field"),
        ({"repetition_penalty": 1.1}, {}, "repetition_penalty", "unsupported_field"),
        ({"min_tokens": 3}, {}, "min_tokens", "unsupported_field"),
        ({"learn": "no"}, {}, "learn", "invalid_value"),
        ({"learn": 0}, {}, "learn", "invalid_value"),
        ({}, {"X-Aurora-Learn": "never"}, None, "invalid_value"),
        ({"learn": False, "custom_params": [1]}, {}, "custom_params", "invalid_value"),
        ({"learn": False, "custom_params": False}, {}, "custom_params", "invalid_value"),
        ({"learn": False, "custom_params": ""}, {}, "custom_params", "invalid_value"),
        ({}, {"X-Aurora-Tenant": "a/b"}, None, "invalid_value"),
        ({"cache_salt": 3}, {}, "cache_salt", "invalid_value"),
    ],
)
def test_what_sglang_cannot_do_is_refused_by_name(
    upstream: Upstream, serve: Callable[..., str], fields: Any, headers: Any, param: str | None, code: str
) -> None:
    answer = post(serve(), fields, **headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert upstream.bodies == []


def test_a_deletion_goes_to_the_plugin_and_not_to_sglang(upstream: Upstream, serve: Callable[..., str]) -> None:
    asked: list[str] = []

    def delete(tenant: str) -> dict[str, Any]:
        asked.append(tenant)
        if tenant == "b":
            raise PluginError("nothing is attached; attach first")
        return {"trajectories": 3, "learner": "told"}

    url = serve(delete=delete)
    answer = httpx.delete(f"{url}/tenant_data", headers={"X-Aurora-Tenant": "a"})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"tenant": "a", "prefixes": None, "answers": 0, "trajectories": 3, "learner": "told"}
    answer = httpx.delete(f"{url}/tenant_data", headers={"X-Aurora-Tenant": "b"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "unavailable")
    assert "nothing was deleted: nothing is attached" in error["message"]
    assert httpx.delete(f"{url}/tenant_data").status_code == 400  # whose?
    assert asked == ["a", "b"] and not upstream.paths


def test_sglangs_errors_come_back_in_openais_form(serve: Callable[..., str]) -> None:
    for stream in (False, True):
        answer = post(serve(), {"do": "refuse", "stream": stream})
        error = {"message": WRONG, "type": "invalid_request_error", "param": None, "code": None}
        assert (answer.status_code, answer.json(), answer.headers["retry-after"]) == (400, {"error": error}, "7")
    error = post(serve(), {"do": "fail"}).json()["error"]
    assert error == {
        "message": "SGLang answers with status 500; see its log", "type": "server_error", "param": None,
        "code": "internal_error",
    }  # fmt: skip


def described(**fields: list[str]) -> dict[str, Any]:
    """An API in OpenAPI's form: fields of the bodies of `chat/completions` and of `completions`."""
    paths, schemas = {}, {}
    for name, known in fields.items():
        body = {"schema": {"$ref": f"#/components/schemas/{name}"}}
        post = {"requestBody": {"content": {"application/json": body}}}
        paths["/v1/completions" if name == "text" else CHAT] = {"post": post}
        schemas[name] = {"properties": dict.fromkeys(known, {})}
    return {"paths": paths, "components": {"schemas": schemas}}


def test_fields_that_sglang_does_not_know_are_refused_by_name(upstream: Upstream, serve: Callable[..., str]) -> None:
    """It would ignore them."""
    upstream.api = described(chat=["temperature", "tools", "n"], text=["temperature", "best_of", "n"])
    url, chat = serve(), CHAT
    for path, field, code, says in (
        (chat, "temprature", "unknown_field", "did you mean 'temperature'?"),
        (chat, "best_of", "unsupported_field", "best_of is not supported by SGLang: leave it out, or set it to 1"),
        ("/v1/completions", "tools", "unsupported_field", "tools is not supported by SGLang"),
    ):
        answer = httpx.post(url + path, json={"n": 1, field: 2})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, field, code)
        assert says in error["message"]
    assert upstream.bodies == []
    fields = {"n": 1, "tools": [], "learn": True, "speculative": True, "reasoning": {"effort": "low"}}
    assert post(url, {**fields, "metadata": {"a": "b"}, "store": False}).status_code == 200
    kept = {"n": 1, "tools": [], "reasoning": {"effort": "low"}, "return_spec_tokens_details": True}
    assert json.loads(upstream.bodies[-1]) == kept


def test_both_names_of_the_budget_hold_on_both_paths(upstream: Upstream, serve: Callable[..., str]) -> None:
    """SGLang's /v1/completions knows one of them."""
    upstream.api = described(chat=["max_tokens", "max_completion_tokens"], text=["max_tokens"])
    url, path = serve(), "/v1/completions"
    assert post(url, {"max_completion_tokens": 3}).status_code == 200
    assert json.loads(upstream.bodies[-1])["max_completion_tokens"] == 3
    for fields in ({"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 3}, {"max_tokens": 3}):
        assert httpx.post(url + path, json=fields).status_code == 200
        assert json.loads(upstream.bodies[-1]) == {"max_tokens": 3, "return_spec_tokens_details": True}
    answer = httpx.post(url + path, json={"max_completion_tokens": 3, "max_tokens": 4})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_completion_tokens")


@pytest.mark.parametrize("api", [None, [], {}, {"paths": {CHAT: {}}}])
def test_an_sglang_that_does_not_describe_its_api_gets_all_fields(
    upstream: Upstream, serve: Callable[..., str], api: Any
) -> None:
    upstream.api = api
    assert post(serve(), {"unknown": 1}).status_code == 200
    assert json.loads(upstream.bodies[-1]) == {"unknown": 1, "return_spec_tokens_details": True}


def test_only_the_paths_of_clients_lead_to_sglang(upstream: Upstream, serve: Callable[..., str]) -> None:
    url = serve()
    assert httpx.get(f"{url}/v1/models").json() == ANSWER
    assert httpx.get(f"{url}/v1/models/Qwen/Qwen3-8B").status_code == 200
    assert upstream.paths == ["/v1/models", "/v1/models/Qwen/Qwen3-8B"]
    for path in ("/flush_cache", "/update_weights_from_tensor", "/generate", "/v1/embeddings"):
        assert httpx.post(url + path, json={}).status_code == 404
    # httpx would tidy the path up before it is sent.
    host, port = url.removeprefix("http://").split(":")
    for path in ("/v1/models/../../flush_cache", "/v1/models/%2e%2e/%2e%2e/flush_cache", "/v1/models/a%3Fb"):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 ")
    assert all(path.startswith("/v1/models/") for path in upstream.paths[1:]), upstream.paths


def test_a_host_header_is_no_part_of_the_path(upstream: Upstream, serve: Callable[..., str]) -> None:
    host, port = serve().removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x/flush_cache?\r\nConnection: close\r\nContent-Length: 2\r\n\r\n"
        connection.sendall(head.encode() + b"{}")
        assert connection.recv(100).startswith(b"HTTP/1.1 ")
    assert set(upstream.paths) <= {CHAT}


def test_nothing_of_one_client_or_of_the_environment_comes_to_the_next(
    upstream: Upstream, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.delenv("NO_PROXY", raising=False)
    url = serve()
    with httpx.Client(base_url=url, trust_env=False) as client:
        for _ in range(2):
            assert client.post(CHAT, json={"do": "cookie"}).status_code == 200
    assert upstream.cookies[-2:] == [None, None]


# ---- health, and what is told about the server ----------------------------------------------------------------------


def test_health_and_info_are_our_own(upstream: Upstream, serve: Callable[..., str]) -> None:
    url = serve(drafter_version=lambda: 7)
    assert httpx.get(f"{url}/health").status_code == 200 and upstream.paths == ["/health"]
    info = httpx.get(f"{url}/server_info").json()
    assert (info["model"], info["engine"], info["drafter_version"]) == ("m", "sglang", 7)
    assert "<html" in httpx.get(f"{url}/").text
    figures = httpx.get(f"{url}/history").json()
    assert (figures["model"], figures["num_running"], figures["num_waiting"]) == ("m", 0, 0)
    assert upstream.paths == ["/health"]


def test_metrics_have_what_runs_and_what_failed(upstream: Upstream, serve: Callable[..., str]) -> None:
    url = serve(max_body=100)

    def metric(name: str) -> float | None:
        text = httpx.get(f"{url}/metrics").text
        found = [line.split(" ")[1] for line in text.splitlines() if line.startswith(f"aurora_{name} ")]
        return float(found[0]) if found else None

    with httpx.stream("POST", url + CHAT, json={"do": "stall", "stream": True}, timeout=30):
        assert metric("num_requests_running") == 1
    assert upstream.left.wait(5)
    post(url, {"do": "refuse"})
    post(url, {"speculative": False})
    post(url, {"a": "x" * 100})
    assert post(url, {}).status_code == 200
    assert metric("num_requests_running") == 0
    for code in ("400", "unsupported_field", "request_too_large"):
        assert metric(f'request_failures_total{{code="{code}"}}') == 1, code


def test_clients_that_left_and_times_that_ran_out_are_counted_and_sglangs_own_cache_is_not(
    upstream: Upstream, serve: Callable[..., str]
) -> None:
    url = serve(timeout=1.0)

    def cancelled() -> float:
        text = httpx.get(f"{url}/metrics").text
        assert not [line for line in text.splitlines() if line.startswith("aurora_prefix_cache")]
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("aurora_requests_canc"))

    assert post(url, {}).status_code == 200 and cancelled() == 0
    for stream in (False, True):  # a client that leaves, and a time that runs out
        body = {"do": "stall" if stream else "hang", "stream": stream}
        with contextlib.suppress(httpx.ReadTimeout):
            with httpx.stream("POST", url + CHAT, json=body, timeout=0.3):
                pass
        wait(lambda: cancelled() == (3 if stream else 1), 5)  # noqa: B023
        assert post(url, body).status_code == (200 if stream else 504)
        wait(lambda: cancelled() == (4 if stream else 2), 5)  # noqa: B023


def test_sglang_that_is_not_there_is_a_bad_gateway(serve: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = serve(f"http://127.0.0.1:{port}")
    answer = post(url, {})
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "bad_gateway" and answer.json()["error"]["type"] == "server_error"
    assert httpx.get(f"{url}/v1/models").status_code == 502
    answer = httpx.get(f"{url}/health")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


# ---- bounds, and clients that leave ---------------------------------------------------------------------------------


def test_keys_sizes_and_origins_are_bounded_as_before_the_embedded_engine(
    upstream: Upstream, serve: Callable[..., str]
) -> None:
    url = serve(api_keys=["key"], max_body=100, cors_origins=["https://chat.example"])
    assert post(url, {}).status_code == 401
    assert post(url, {}, Authorization="Bearer key").status_code == 200
    assert post(url, {"a": "x" * 100}, Authorization="Bearer key").status_code == 413
    assert len(upstream.bodies) == 1
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(url + CHAT, headers=asked).headers["access-control-allow-origin"] == "https://chat.example"
    answer = httpx.post(url + CHAT, content=b"no json", headers={"Authorization": "Bearer key"})
    assert answer.status_code == 415


@pytest.mark.parametrize("body", [{"do": "hang"}, {"do": "stall", "stream": True}])
def test_a_client_that_leaves_ends_the_work_of_sglang(
    upstream: Upstream, serve: Callable[..., str], body: dict[str, Any]
) -> None:
    host, port = serve().removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + data)
        if "stream" in body:
            assert connection.recv(10) == b"HTTP/1.1 2"
        else:
            assert not upstream.left.wait(0.3)
    assert upstream.left.wait(5)


def test_more_requests_than_may_wait_are_told_when_to_come_again(upstream: Upstream, serve: Callable[..., str]) -> None:
    url, hangs = serve(num_slots=lambda: 1, max_waiting=1), {"do": "stall", "stream": True}
    with (
        httpx.stream("POST", url + CHAT, json=hangs, timeout=30),
        httpx.stream("POST", url + CHAT, json=hangs, timeout=30),
    ):
        answer = post(url, {})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        message = "1 requests wait already, and http.max_waiting allows 1; try again later"
        error = {"message": message, "type": "rate_limit_error", "param": None, "code": "queue_full"}
        assert answer.json() == {"error": error} and len(upstream.bodies) == 2
        assert httpx.post(f"{url}/tokenize", json={}).status_code == 200  # needs no slot
        text = httpx.get(f"{url}/metrics").text
        for sample in ("num_requests_running", "num_requests_waiting", 'request_failures_total{code="queue_full"}'):
            assert f"aurora_{sample} 1.0\n" in text
        figures = httpx.get(f"{url}/server_info").json()
        assert (figures["num_running"], figures["num_waiting"]) == (1, 1)
    assert upstream.left.wait(5)
    wait(lambda: post(url, {}).status_code == 200, 5)


def test_time_is_bounded(upstream: Upstream, serve: Callable[..., str]) -> None:
    url = serve(timeout=0.3)
    answer = post(url, {"do": "hang"})
    assert answer.status_code == 504 and "http.timeout" in answer.json()["error"]["message"]
    assert upstream.left.wait(5)


@pytest.mark.parametrize(("do", "code"), [("stall", "timeout"), ("break", "bad_gateway")])
def test_a_stream_that_does_not_end_well_says_so(
    upstream: Upstream, serve: Callable[..., str], do: str, code: str
) -> None:
    answer = post(serve(timeout=0.5), {"do": do, "stream": True})
    *_, last, done, _ = answer.text.split("\n\n")
    assert answer.status_code == 200 and done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    assert upstream.left.wait(5)
