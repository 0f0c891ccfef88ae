"""A tiny model, and a stand-in of SGLang, behind the real server on free ports of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from driven_engine import LENGTH, ClientRig, driven
from sglang_stand_in import Upstream
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aurora_rl.envs import SamplingParams
from aurora_rl.models.detokenizer import detokenize
from aurora_rl.models.loading import load_target, stop_token_ids
from aurora_rl.serving.http.front import Front
from aurora_rl.serving.http.proxy import Proxy
from aurora_rl.serving.http.server import HttpServer
from aurora_rl.telemetry.history import RunHistory
from aurora_rl.telemetry.prometheus import Exporter

MODEL, WAITING = "tiny/model", 8


class Rig(ClientRig):
    """An engine that decodes in its thread, and servers in front of it.

    Attributes:
        url: The server with the usual settings, without keys.
        history: What the servers' pages show.
        metrics: What all of them export.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        target, self.tokenizer = load_target(model, dtype=torch.float64, device="cpu")
        self.target: PreTrainedModel = target
        self.stop_tokens = stop_token_ids(target, self.tokenizer)
        super().__init__(
            target, folder, decode=lambda tokens: detokenize(self.tokenizer, tokens), draft_vocab=64,
            stop_tokens=self.stop_tokens, max_waiting=WAITING,
        )  # fmt: skip
        self._servers: list[HttpServer] = []
        self.history, self.metrics = RunHistory(), Exporter()
        self.clients.observe = self.metrics.observe
        self._driven = driven(self.clients, self.server)
        self._driven.__enter__()
        self.url = self.serve(drafter_version=lambda: self.server.stats.version)

    def serve(self, **settings: Any) -> str:
        """Start one more server, and return where it is."""
        usual: dict[str, Any] = {
            "model": MODEL, "vocab_size": 300, "max_length": LENGTH, "max_waiting": WAITING,
            "num_spec_tokens": lambda: 5, "sampling_params": SamplingParams(),
            "history": self.history, "metrics": self.metrics,
        }  # fmt: skip
        server = HttpServer("127.0.0.1", 0)
        self._servers.append(server)
        server.start(Front(self.clients, self.tokenizer, **{**usual, **settings}).starlette())
        return server.url

    def stop(self, url: str) -> None:
        """Stop one of the servers."""
        next(server for server in self._servers if server.url == url).stop()

    def plain(self, prompt: list[int], count: int) -> list[int]:
        """Greedy decoding without a cache, the stop token included."""
        tokens = list(prompt)
        with torch.inference_mode():
            while len(tokens) < len(prompt) + count and (tokens == prompt or tokens[-1] not in self.stop_tokens):
                tokens.append(int(self.target(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    def idle(self, seconds: float = 10.0) -> bool:
        """Whether no request runs or waits any more, within some seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.clients.num_running and not self.clients.num_waiting:
                return True
            time.sleep(0.01)
        return False

    def close(self) -> None:
        self._driven.__exit__(None, None, None)
        for server in self._servers:
            server.stop()


@pytest.fixture(scope="package")
def make_rig(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Rig]]:
    rigs: list[Rig] = []

    def make() -> Rig:
        rigs.append(Rig(tiny_folder, tmp_path_factory.mktemp("http")))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture(scope="package")
def rig(make_rig: Callable[[], Rig]) -> Rig:
    return make_rig()


@pytest.fixture
def slow(rig: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine, idle, with rounds so slow that a long request lasts for seconds."""
    assert rig.idle()
    verify = rig.env.engine.verify

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return verify(*args, **kwargs)

    monkeypatch.setattr(rig.env.engine, "verify", slowly)
    yield rig
    assert rig.idle(2.0)  # whatever a test leaves, it frees its slots


@pytest.fixture(scope="package")
def tokenizer(rig: Rig) -> PreTrainedTokenizerBase:
    return rig.tokenizer


@pytest.fixture(scope="package")
def client(rig: Rig) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{rig.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def _upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.stop()


@pytest.fixture
def upstream(_upstream: Upstream) -> Upstream:
    _upstream.api = None
    _upstream.bodies.clear()
    _upstream.paths.clear()
    _upstream.left.clear()
    return _upstream


@pytest.fixture
def serve(upstream: Upstream) -> Iterator[Callable[..., str]]:
    """Starts a front with settings; returns where it is."""
    usual = {"model": "m", "history": RunHistory(), "max_waiting": 8, "num_slots": lambda: 4}
    usual["delete"] = lambda tenant: {}
    servers: list[HttpServer] = []

    def start(url: str = upstream.url, **settings: Any) -> str:
        servers.append(HttpServer("127.0.0.1", 0))
        servers[-1].start(Proxy(url, **{**usual, "metrics": Exporter(), **settings}).starlette())
        return servers[-1].url

    yield start
    for server in servers:
        server.stop()
