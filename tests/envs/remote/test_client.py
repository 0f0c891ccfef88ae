"""A client of any engine: its process, what is asked by HTTP, and hooks that saw nothing."""

import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from attach_fields import HANDSHAKE

from aurora_rl.envs import Request
from aurora_rl.envs.remote.client import EngineClient, EngineCompletion, EngineError, free_ports
from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.envs.remote.session import ATTACH


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
            [sys.executable, "-c", code],
            "http://127.0.0.1:9",
            plugin=True,
            environment={},
            log=tmp_path / "log",
            keys=None,
        )


HEALTHY = """
import http.server, sys
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print("the hooks were not registered", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


class Mute(Silent):
    """One whose plugin nobody reaches."""

    def status(self) -> dict[str, Any]:
        raise PluginError(f"no answer at {self.plugin_address}")


@pytest.mark.parametrize("kind", [Silent, Mute])
def test_a_server_is_started_with_its_plugin_or_not_at_all(kind, tmp_path):
    (port,) = free_ports(1)

    def start(**options: Any) -> EngineClient:
        command = [sys.executable, "-c", HEALTHY, str(port)]
        url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
        return kind.start(command, url, environment={}, log=log, keys=None, **options)

    with start(plugin=False) as engine:
        assert engine.plugin_address is None
    if kind is Mute:
        with pytest.raises(EngineError, match=r"no answer at ipc://\S+/plugin: the hooks were not registered"):
            start(plugin=True)
        return
    with start(plugin=True) as engine:
        folder = Path(str(engine.plugin_address).removeprefix("ipc://")).parent
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


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


@pytest.mark.parametrize(("options", "told"), [({}, 256), ({"part_tokens": 8}, 8), ({"part_tokens": None}, 0)])
def test_attaching_tells_after_how_many_tokens_a_part_is_sent(
    options: dict[str, Any], told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, sent = Silent("http://127.0.0.1:9"), dict[str, Any]()
    monkeypatch.setattr(client, "probe", lambda status: None)
    monkeypatch.setattr(client, "_ask", lambda kind, fields: sent.update(fields))
    client.attach(handshake=HANDSHAKE, trajectories="tcp://a:1", weights="tcp://a:2", **options)
    assert sent["part_tokens"] == told and set(sent) == set(ATTACH)


def test_free_ports_are_free() -> None:
    with ExitStack() as opened:
        for port in free_ports(3):
            opened.enter_context(socket.create_server(("127.0.0.1", port)))
