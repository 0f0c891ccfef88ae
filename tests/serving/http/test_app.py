"""What applications in front of any engine share: origins of pages, errors, and what must be installed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import httpx


def test_pages_of_other_origins_are_let_in_by_name_only(rig: Any) -> None:
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    more = {"Access-Control-Request-Headers": "authorization,content-type"}
    shut = httpx.options(f"{rig.url}/v1/completions", headers=asked | more)
    assert shut.status_code == 405 and "access-control-allow-origin" not in shut.headers
    url = rig.serve(cors_origins=["https://chat.example"], api_keys=["key"])
    let_in = httpx.options(f"{url}/v1/completions", headers=asked | more)
    assert let_in.status_code == 200
    assert let_in.headers["access-control-allow-origin"] == "https://chat.example"
    assert "authorization" in let_in.headers["access-control-allow-headers"]
    deletes = httpx.options(f"{url}/tenant_data", headers=asked | {"Access-Control-Request-Method": "DELETE"})
    assert deletes.status_code == 200
    stranger = httpx.options(f"{url}/v1/completions", headers=asked | more | {"Origin": "https://evil.example"})
    assert stranger.status_code == 400 and "access-control-allow-origin" not in stranger.headers
    put = httpx.options(f"{url}/v1/completions", headers=asked | {"Access-Control-Request-Method": "PUT"})
    assert put.status_code == 400 and put.headers["access-control-allow-origin"] == "https://chat.example"
    refusals = {"'https://evil.example' may not send": stranger, "may not send 'PUT': Disallowed CORS method": put}
    for says, answer in refusals.items():
        assert answer.headers["content-type"] == "application/json" and "Origin" in answer.headers["vary"]
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"} and says in error["message"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "cors_refused")
    refused = httpx.get(f"{url}/v1/models", headers={"Origin": "https://chat.example"})
    assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
    assert refused.headers["access-control-expose-headers"] == "Retry-After"  # which 429 and 503 have


def test_an_error_of_the_program_has_the_same_form(rig: Any) -> None:
    failed = httpx.get(f"{rig.serve(drafter_version=lambda: 1 // 0)}/server_info")
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "internal_error"


def test_without_the_extra_the_import_names_it() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; import aurora_rl.serving.http"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'aurora-rl[serve]'" in out.stderr.splitlines()[-1]
