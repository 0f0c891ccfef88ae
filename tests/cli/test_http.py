"""The HTTP front: what is wrong with its settings is found when it is made."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest

from aurora_rl.cli.config import load_config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.http import HttpFront


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"http.port={port}: Address already in use; choose others, or port 0"):
            HttpFront.of(load_config(overrides=[f"http.port={port}"]))


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
    assert HttpFront.of(load_config(overrides=["engine.name=sglang", "drafter.name=eagle3"])) is None
    front = HttpFront.of(load_config(overrides=["http.port=0"]))
    assert front is not None and front.url.startswith("http://127.0.0.1:")
    front.stop()
