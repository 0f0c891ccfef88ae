"""A stand-in of SGLang for those who attach: its texts were recorded, its ends of the wire are the plugin's own."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.keys import plugin_server_keys
from aurora_rl.envs.remote.plugin_server import PluginError, PluginServer
from aurora_rl.envs.remote.recorded_totals import RecordedTotals
from aurora_rl.envs.remote.session import Session
from aurora_rl.models.loading import load_target
from aurora_rl.policies import TargetParts, TreeShape
from aurora_rl.policies.formats.files import load_drafter
from aurora_rl.serving.http.server import HttpServer
from aurora_rl.testing import serve

DEPTH, TOKENS, TEXTS = 3, 24, 24


class RecordedSGLang:
    """Serves completions over HTTP, each of which brings a trajectory of chains, and takes what the learner publishes.

    Args:
        model: Folder of the target.
        drafter: Folder of its drafter.
        keys: Folder of its keys.

    Attributes:
        url: Where clients ask.
        plugin_address: Where the plugin answers.
        session: The session of the learner that is attached; None without one.
    """

    def __init__(self, model: Path, drafter: Path, keys: str | None = None) -> None:
        target, _ = load_target(model, dtype=torch.float32, device="cpu")
        prompts = [torch.randint(3, 250, (6,)) for _ in range(TEXTS)]
        own = load_drafter(drafter, TargetParts.of(target))
        self._texts = serve(own, target, prompts, shape=TreeShape(DEPTH), max_new_tokens=TOKENS, num_slots=4)
        self._engine = {
            "device": "cpu", "model": str(model), "dtype": "float32", "context": 512, "depth": DEPTH, "width": 1,
            "num_nodes": DEPTH, "slots": 2,
        }  # fmt: skip
        self.session: Session | None = None
        self._keys = keys
        self._seen, self._served, self._last, self._lock = 0, 0, "", threading.Lock()
        self._plugin = PluginServer(
            "tcp://127.0.0.1:*", self._answer, keys=None if keys is None else plugin_server_keys(keys)
        )
        self.plugin_address = self._plugin.address
        self._server = HttpServer("127.0.0.1", 0)
        self._server.start(
            Starlette(
                routes=[
                    Route("/generate", self._probe, methods=["POST"]),
                    Route("/v1/completions", self._complete, methods=["POST"]),
                ]
            )
        )
        self.url = self._server.url

    def _answer(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            if kind == "attach":
                if self.session is not None:
                    raise PluginError("a learner is attached already; detach first")
                self.session = Session(fields, engine="SGLang", exact=True, keys=self._keys)
                self._last = self.session.id
            elif kind == "detach" and self.session is not None:
                over, self.session = self.session, None
                over.close()
                return {**self._status(), **over.status()}
            return self._status()

    def _status(self) -> dict[str, Any]:
        seen = {"seen": {"prefill": self._seen, "verify": self._seen}, "session": self._last}
        own = {} if self.session is None else self.session.status()
        return {**self._engine, **seen, "attached": self.session is not None, **own}

    async def _probe(self, request: Request) -> Response:
        self._seen += 1
        return JSONResponse({"output_ids": [1], "meta_info": {}})

    async def _complete(self, request: Request) -> Response:
        with self._lock:
            text = self._texts[self._served % TEXTS]
            self._served += 1
            if self.session is not None:
                self._swap(self.session)
                assembler = self.session.assembler
                assembler.totals = assembler.totals.plus(replace(RecordedTotals.of(text), requests=1))
                self.session.sink.extend(text)
        choice = {"index": 0, "text": "text", "finish_reason": "length"}
        return JSONResponse({"choices": [choice], "usage": {"completion_tokens": TOKENS}})

    def _swap(self, session: Session) -> None:
        if (received := session.receiver.latest()) is not None:
            session.version, tree = received
            session.swap_ms.append(1.5)
            session.receiver.acknowledge(session.version, checksum(dict(tree.flatten_keys(".").items())), 1.5)

    def close(self) -> None:
        self._server.stop()
        self._plugin.close()
        if self.session is not None:
            self.session.close()
