"""Bearer keys: who may use the server, and where its keys come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from aurora_rl.serving.http.keys import ENVIRONMENT, read_api_keys
from aurora_rl.telemetry.prometheus import Exporter


def test_keys_open_the_server(rig: Any) -> None:
    url = rig.serve(api_keys=["first", "größer"])
    body = {"prompt": "a", "max_tokens": 1}
    for sent in [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer second"}, {"Authorization": "first"}]:
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=sent)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for key in ("first", "größer"):
        sent = {"Authorization": b"bearer " + key.encode()}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=sent).status_code == 200
    for path in ("/v1/models", "/server_info", "/metrics", "/health_generate", "/v1/nothing"):
        assert httpx.get(f"{url}{path}").status_code == 401
    for path in ("/tokenize", "/detokenize"):
        assert httpx.post(f"{url}{path}", json={}).status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
            client.models.list()
        assert len(client.with_options(api_key="first").models.list().data) == 1


def test_a_wrong_key_is_counted(rig: Any) -> None:
    metrics = Exporter()
    url = rig.serve(api_keys=["key"], metrics=metrics)
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert httpx.post(f"{url}{path}", json={}).status_code == 401
    assert httpx.get(f"{url}/metrics").status_code == 401  # which asks for no completion
    assert b'aurora_request_failures_total{code="invalid_api_key"} 2.0' in metrics.expose({})


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\none\n\n  two \n")
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert read_api_keys(None) == [] and read_api_keys(file) == ["one", "two"]
    monkeypatch.setenv(ENVIRONMENT, "three, four\nfive")
    assert read_api_keys(None) == ["three", "four", "five"] and read_api_keys(file) == ["one", "two"]
    monkeypatch.setenv(ENVIRONMENT, " ")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT} holds no API key"):
        read_api_keys(None)
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no API key"):
        read_api_keys(file)
    with pytest.raises(ValueError, match="cannot read the API keys: .*absent"):
        read_api_keys(tmp_path / "absent")
