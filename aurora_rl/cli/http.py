"""The HTTP front of a run, from its configuration."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.spec import RunSpec
from aurora_rl.serving.async_engine import AsyncEngine
from aurora_rl.serving.server import InferenceServer

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from aurora_rl.serving.http.server import HttpServer


def listen(config: Config) -> HttpServer | None:
    """Take the port, so that one in use is an error before a model is loaded; None if there is to be no server.

    SGLang has a server of its own, to which clients talk.
    """
    if config.http.port is None or config.engine.name == "sglang":
        return None
    missing = [name for name in ("starlette", "uvicorn", "pydantic") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the HTTP server needs {' and '.join(missing)}: pip install 'aurora-rl[serve]', or set http.port=null"
        )
    from aurora_rl.serving.http.server import HttpServer

    return HttpServer(config.http.host, config.http.port)


def application(
    spec: RunSpec, tokenizer: PreTrainedTokenizerBase, vocab_size: int, clients: AsyncEngine, server: InferenceServer
) -> Starlette:
    """Build the application that answers over HTTP."""
    from aurora_rl.serving.http.app import create_app
    from aurora_rl.serving.http.keys import read_api_keys

    config = spec.config
    http = config.http
    return create_app(
        clients,
        tokenizer,
        model=config.model,
        vocab_size=vocab_size,
        max_length=config.engine.max_length,
        max_waiting=http.max_waiting,
        sampling=spec.sampling,
        num_spec_tokens=spec.tree.depth,
        drafter_version=lambda: server.stats.version,
        api_keys=read_api_keys(http.api_keys),
        max_body=http.max_body,
        timeout=http.timeout,
        cors_origins=http.cors_origins,
    )
