"""The HTTP front of a run, from its configuration."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.spec import RunSpec
from aurora_rl.remote_engines import REMOTE_ENGINES
from aurora_rl.serving.async_engine import AsyncEngine
from aurora_rl.serving.attached import AttachedServer
from aurora_rl.serving.server import InferenceServer
from aurora_rl.telemetry.history import RunHistory

if TYPE_CHECKING:
    from aurora_rl.serving.http.app import Application


# Failures of the resolver, and not of the name.
_RESOLVER_FAILED = (socket.EAI_AGAIN, socket.EAI_MEMORY, socket.EAI_SYSTEM)


class HttpFront:
    """OpenAI's API in front of a server. What is wrong with its settings is found before a model is loaded.

    Attributes:
        url: Address of the server.
        metrics: What is exported for Prometheus; to follow the events of the run.

    Raises:
        ConfigError: A package is missing, or the host's name is unknown.
        ValueError: The port is in use, the host's name cannot be looked up now, or the file of keys cannot be read.
    """

    def __init__(self, config: Config) -> None:
        packages = ("starlette", "uvicorn", "httptools", "prometheus_client")
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(f"the HTTP server needs {' and '.join(missing)}: pip install 'aurora-rl[serve]'")
        from aurora_rl.serving.http.keys import read_api_keys
        from aurora_rl.serving.http.server import HttpServer
        from aurora_rl.telemetry.prometheus import Exporter

        assert config.http.port is not None
        self._keys = read_api_keys(config.http.api_keys)
        unknown = None
        try:
            self._server = HttpServer(config.http.host, config.http.port)
        except ValueError as error:
            unknown = error.__cause__
            if isinstance(unknown, socket.gaierror) and unknown.errno in _RESOLVER_FAILED:
                raise ValueError(
                    f"http.host={config.http.host} cannot be looked up now: {unknown.strerror}; start again once names "
                    "resolve, or give an address of this machine, such as 127.0.0.1"
                ) from unknown
            if not isinstance(unknown, socket.gaierror | TypeError):
                raise
        if unknown is not None:  # not within the block: an error that comes from a gaierror is taken for passing
            reason = unknown.strerror if isinstance(unknown, OSError) else unknown
            raise ConfigError(
                f"http.host={config.http.host} is no address and no known name: {reason}; give an address of this "
                "machine, such as 127.0.0.1, or 0.0.0.0 for all of them"
            )
        self.url = self._server.url
        self.metrics = Exporter()
        self._load: Callable[[], Mapping[str, int]]

    @classmethod
    def of(cls, config: Config, *, replays: bool = False) -> HttpFront | None:
        """Return the front of a run, which needs no clients if it ``replays`` traffic; None if ``http.port`` is null.

        Raises:
            ConfigError: The configuration leaves clients no port, or a budget to those of a remote engine; or see the
                constructor.
        """
        remote = config.engine.remote
        if remote and not replays and config.max_new_tokens is not None:
            raise ConfigError(
                f"max_new_tokens={config.max_new_tokens}: {REMOTE_ENGINES[config.engine.name]} itself chooses the "
                "budget of requests that name none; leave the key out"
            )
        needed = not replays and not remote  # a remote engine has a port of its own
        if config.http.port is None:
            if needed:
                raise ConfigError("http.port=null: nobody could ask the server; give a port, or drive it by flywheel")
            return None
        try:
            return cls(config)
        except ValueError as error:
            if needed:
                raise
            raise ConfigError(f"{error}; http.port=null opens none") from error

    def start(
        self,
        spec: RunSpec,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        clients: AsyncEngine,
        server: InferenceServer,
        history: RunHistory,
    ) -> None:
        """Begin to answer, and to show the run."""
        from aurora_rl.serving.http.front import Front

        # A round that waits for the interpreter's lock is to have it back soon, and not after Python's usual 5 ms.
        sys.setswitchinterval(2e-4)
        clients.observe = self.metrics.observe
        config = spec.config
        front = Front(
            clients,
            tokenizer,
            vocab_size=vocab_size,
            max_length=server.env.engine.max_length,
            max_waiting=config.http.max_waiting,
            sampling_params=spec.sampling_params,
            max_tokens=config.max_new_tokens,
            num_spec_tokens=lambda: server.depth,
            **self._common(config, server, history),
        )
        self._start(front)

    def start_proxy(self, spec: RunSpec, server: AttachedServer, history: RunHistory) -> None:
        """Begin to pass requests on to SGLang, and to show the run."""
        from aurora_rl.serving.http.proxy import Proxy

        proxy = Proxy(
            server.client.url,
            max_waiting=spec.config.http.max_waiting,
            num_slots=lambda: server.num_slots,
            num_spec_tokens=lambda: server.depth,
            opt_out=spec.config.privacy.opt_out,
            delete=server.client.delete,
            **self._common(spec.config, server, history),
        )
        self._start(proxy)

    def _common(self, config: Config, server: InferenceServer | AttachedServer, history: RunHistory) -> dict[str, Any]:
        """Return the arguments that applications in front of any engine take."""
        return {
            "model": config.http.served_model_name or config.model,
            "history": history,
            "metrics": self.metrics,
            "drafter_version": lambda: server.stats.version,
            "api_keys": self._keys,
            "max_body": config.http.max_body,
            "timeout": config.http.timeout,
            "cors_origins": config.http.cors_origins,
        }

    def _start(self, application: Application) -> None:
        self._load = application.load
        self._server.start(application.starlette())

    def clients(self) -> dict[str, Any]:
        """Return how clients fare, for a "status" event: their running and waiting requests, and mean waits."""
        load = self._load()
        return {"running": load["num_running"], "waiting": load["num_waiting"], "waits": self.metrics.mean_waits()}

    def stop(self) -> None:
        """Close the port, and let answers end for a few seconds."""
        self._server.stop()
