"""`DELETE /tenant_data`: whose it is, what it waits for, and what it leaves."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import wait

from aurora_rl.policies.lookup import EarlierAnswers
from aurora_rl.prefix_cache import PrefixCache

A, B = ({"X-Aurora-Tenant": name} for name in "ab")


@pytest.fixture
def stores(rig: Any) -> Iterator[None]:
    assert rig.idle()
    rig.env.engine.prefix_cache, rig.server.policy.earlier = PrefixCache(4096), EarlierAnswers(4096)
    rig.deleted.clear()
    yield
    rig.env.engine.prefix_cache = rig.server.policy.earlier = None


def complete(url: str, headers: dict[str, str], tokens: int = 4) -> int:
    """Complete a prompt, and return how much of it was in the prefix cache."""
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.usefixtures("stores")
def test_a_tenants_data_is_deleted_and_no_other_tenants(rig: Any) -> None:
    for headers in (A, A, B, {}):
        complete(rig.url, headers)
    answer = httpx.delete(f"{rig.url}/tenant_data", headers=A)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"tenant": "a", "prefixes": 1, "answers": 2, "trajectories": 0, "learner": "told"}
    assert rig.deleted == ["a"]
    assert complete(rig.url, A) == 0 < complete(rig.url, B) == complete(rig.url, {})


@pytest.mark.usefixtures("stores")
def test_the_command_of_the_privacy_page(rig: Any) -> None:
    """As printed, but for the server's address; what it prints has these fields."""
    page = (Path(__file__).parents[3] / "docs" / "privacy.md").read_text()
    command, printed = page.split("## Delete a tenant's data\n\n```text\n")[1].split("\n```")[0].splitlines()
    words = shlex.split(command.replace("http://127.0.0.1:8000", rig.url))
    headers = dict(words[place + 1].split(": ", 1) for place, word in enumerate(words) if word == "-H")
    assert words[:3] == ["curl", "-X", "DELETE"] and len(words) == 4 + 2 * len(headers)
    answer = httpx.delete(words[3], headers=headers).json()
    assert answer.keys() == json.loads(printed).keys() and answer["tenant"] == json.loads(printed)["tenant"]


@pytest.mark.usefixtures("stores")
def test_requests_in_flight_are_completed_first_and_leave_nothing(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four in two slots, two of the tenant's: one runs and one waits."""
    go, step, learned = threading.Event(), rig.server.step, len(rig.learned)
    monkeypatch.setattr(rig.server, "step", lambda: go.wait(0.01) and step())
    with ThreadPoolExecutor(5) as pool:
        flying = [pool.submit(complete, rig.url, headers, 24) for headers in (A, B, A, B)]
        wait(lambda: rig.clients.num_waiting == 4)
        deletion = pool.submit(httpx.delete, f"{rig.url}/tenant_data", headers=A, timeout=30)
        wait(lambda: rig.clients._deletions)
        assert not deletion.done() and not rig.deleted
        go.set()
        answer = deletion.result(30).json()
        assert [each.result(30) >= 0 for each in flying] == [True] * 4
    assert (answer["answers"], rig.deleted) == (0, ["a"]) and answer["prefixes"] >= 1
    assert len(rig.learned) == learned + 2
    assert complete(rig.url, A) == 0


def test_a_deletion_needs_a_tenant_a_key_and_an_engine(rig: Any, make_rig: Callable[[], Any]) -> None:
    answer = httpx.delete(f"{rig.url}/tenant_data")
    assert answer.status_code == 400 and "name the tenant in the header X-Aurora-Tenant" in answer.text
    assert httpx.delete(f"{rig.url}/tenant_data", headers={"X-Aurora-Tenant": "a/b"}).status_code == 400
    assert httpx.post(f"{rig.url}/tenant_data", headers=A).status_code == 405
    guarded = rig.serve(api_keys=["secret"])
    assert httpx.delete(f"{guarded}/tenant_data", headers=A).status_code == 401
    assert httpx.delete(f"{guarded}/tenant_data", headers={**A, "Authorization": "Bearer secret"}).status_code == 200
    ended = make_rig()
    ended.clients.end()
    answer = httpx.delete(f"{ended.url}/tenant_data", headers=A)
    assert answer.status_code == 503 and "shutting down" in answer.text and answer.headers["retry-after"] == "5"
    assert "shutting down" in httpx.get(f"{ended.url}/health").text
