"""A client of any engine: its process, what is asked by HTTP, and hooks that saw nothing."""

import socket
import sys
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from aurora_rl.envs import Request
from aurora_rl.envs.recording.client import EngineClient, EngineCompletion, EngineError, free_ports
from aurora_rl.envs.recording.plugin_server import PluginError


class Silent(EngineClient):
    """A client of an engine whose status stays what it was."""

    engine, error = "Bare", EngineError
    seen: dict[str, int] = {}

    def generate(self, request: Request, **_: Any) -> EngineCompletion:
        return EngineCompletion(request, torch.arange(1), True, 0, {}, [], 0)

    def status(self) -> dict[str, Any]:
        return {"seen": {"prefill": 1, "verify": 1}}


def test_a_process_that_ends_is_told_with_the_end_of_its_log(tmp_path):
    code = "import sys; print('out of memory'); sys.exit(3)"
    with pytest.raises(EngineError, match="(?s)Bare ended with status 3: out of memory"):
        Silent.start(
            [sys.executable, "-c", code], "http://127.0.0.1:9", None, environment={}, log=tmp_path / "log", keys=None
        )


def test_a_server_that_does_not_answer_is_named():
    (port,) = free_ports(1)
    with Silent(f"http://127.0.0.1:{port}/") as client:
        with pytest.raises(EngineError, match=f"Bare at http://127.0.0.1:{port} does not answer /v1/models"):
            client.get("/v1/models", 1.0)
        with pytest.raises(EngineError, match="does not answer after 0 s: see its log"):
            client.wait_ready(0.0)
        with pytest.raises(PluginError, match="no plugin address; set engine.plugin_address"):
            client.detach()


def test_hooks_that_saw_nothing_are_named():
    client = Silent("http://127.0.0.1:9")
    with pytest.raises(PluginError, match=r"the hooks \['verify'\] saw nothing of it: Bare drafts or verifies"):
        client.probe({"seen": {"prefill": 0, "verify": 1}})
    client.probe({"seen": {}})


def test_free_ports_are_free_and_so_are_those_that_follow() -> None:
    first, last = free_ports(2, following=2)
    with ExitStack() as opened:
        for port in (first, last, last + 1, last + 2):
            opened.enter_context(socket.create_server(("127.0.0.1", port)))
