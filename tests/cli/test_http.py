"""The HTTP front: what is wrong with its settings is found when it is made."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from aurora_rl.cli.config import load_config
from aurora_rl.cli.errors import ConfigError, may_pass
from aurora_rl.cli.http import HttpFront
from aurora_rl.cli.spec import resolve
from aurora_rl.serving.http.server import HttpServer
from aurora_rl.telemetry.history import RunHistory


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"http.port={port}: Address already in use; choose others, or port 0"):
            HttpFront.of(load_config(overrides=[f"http.port={port}"]))


def fail_to_resolve(monkeypatch: pytest.MonkeyPatch, code: int, says: str) -> None:
    """Have sockets fail to bind as the resolver's failure has them fail, whatever this machine's resolver would do."""

    class Unresolved(socket.socket):
        def bind(self, address: Any) -> None:
            raise socket.gaierror(code, says)

    monkeypatch.setattr(socket, "socket", Unresolved)


@pytest.mark.parametrize("code", [socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_FAIL, None])
@pytest.mark.parametrize("replays", [False, True])
def test_a_host_that_is_no_name_does_not_pass_by_itself(
    code: int | None, replays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = "\u00e9" * 70  # which cannot be a name, so that nobody is asked
    if code is not None:
        host = "nowhere.invalid"
        fail_to_resolve(monkeypatch, code, "Name or service not known")
    says = f"^http.host={host} is no address and no known name: .*; give an address of this machine, such as 127"
    with pytest.raises(ConfigError, match=says) as caught:
        HttpFront.of(load_config(overrides=[f"http.host={host}", "http.port=0"]), replays=replays)
    assert not may_pass(caught.value)


@pytest.mark.parametrize("code", [socket.EAI_AGAIN, socket.EAI_SYSTEM])
@pytest.mark.parametrize("replays", [False, True])
def test_a_resolver_that_fails_may_work_again(code: int, replays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_resolve(monkeypatch, code, "Temporary failure in name resolution")
    says = "^http.host=here cannot be looked up now: Temporary failure in name resolution; start again once names res"
    with pytest.raises(ValueError, match=says) as caught:
        HttpFront.of(load_config(overrides=["http.host=here", "http.port=0"]), replays=replays)
    assert may_pass(caught.value)


def test_a_run_that_needs_no_clients_is_told_how_to_do_without() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"http.port={port}: Address already in use; .*; http.port=null opens none"
        ):
            HttpFront.of(load_config(overrides=[f"http.port={port}"]), replays=True)


def test_keys_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot read the API keys: .*{tmp_path}/none"):
        HttpFront.of(load_config(overrides=["http.port=0", f"http.api_keys={tmp_path}/none"]))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(ConfigError, match=r"needs uvicorn: pip install 'aurora-rl\[serve\]'"):
        HttpFront.of(load_config(overrides=["http.port=0"]))


def test_a_server_without_a_port_is_refused_and_sglang_has_its_own() -> None:
    with pytest.raises(ConfigError, match="http.port=null: nobody could ask the server"):
        HttpFront.of(load_config(overrides=["http.port=null"]))
    sglang = ["engine.name=sglang", "drafter.name=eagle3"]
    assert HttpFront.of(load_config(overrides=[*sglang, "http.port=null"])) is None
    assert HttpFront.of(load_config(overrides=["http.port=null"]), replays=True) is None
    for pairs in ([], sglang):
        front = HttpFront.of(load_config(overrides=[*pairs, "http.port=0"]))
        assert front is not None and front.url.startswith("http://127.0.0.1:")
        front.stop()


def test_a_budget_that_sglangs_clients_would_not_get_is_refused() -> None:
    for port in ("null", "0"):
        pairs = ["engine.name=sglang", "drafter.name=eagle3", f"http.port={port}", "max_new_tokens=8"]
        with pytest.raises(
            ConfigError, match="max_new_tokens=8: SGLang itself chooses the budget.*; leave the key out"
        ):
            HttpFront.of(load_config(overrides=pairs))


def test_before_sglang_requests_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AURORA_RL_API_KEYS", "key")
    pairs = ["engine.name=sglang", "drafter.name=eagle3", "http.port=0", "http.max_body=10", "model=org/model"]
    spec = resolve(load_config(overrides=pairs))
    front, upstream = HttpFront.of(spec.config), HttpServer("127.0.0.1", 0)
    assert front is not None

    async def answer(request: Request) -> Response:
        return Response(await request.body())

    upstream.start(Starlette(routes=[Route("/v1/completions", answer, methods=["POST"])]))
    engine, stats = SimpleNamespace(url=upstream.url, delete=None), SimpleNamespace(version=3)
    server: Any = SimpleNamespace(client=engine, stats=stats, num_slots=2, depth=3)
    front.start_proxy(spec, server, RunHistory())
    try:
        with httpx.Client(base_url=front.url, headers={"Authorization": "Bearer key"}) as client:
            asked = {"n": 1, "return_spec_tokens_details": True}
            assert client.post("/v1/completions", json={"n": 1}).json().items() >= asked.items()
            assert client.post("/v1/completions", json={"prompt": "too long"}).status_code == 413
            info = client.get("/server_info").json()
            assert (info["model"], info["drafter_version"]) == ("org/model", 3)
        assert httpx.get(f"{front.url}/server_info").status_code == 401
    finally:
        front.stop()
        upstream.stop()
