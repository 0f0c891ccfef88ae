"""The application: OpenAI's API and what operators ask, over an engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute
from transformers import PreTrainedTokenizerBase

from aurora_rl.envs import SamplingParams
from aurora_rl.models.detokenizer import token_bytes
from aurora_rl.serving.async_engine import AsyncEngine
from aurora_rl.serving.http import errors
from aurora_rl.serving.http.front import Front
from aurora_rl.serving.http.keys import Keys
from aurora_rl.serving.http.live_page import FILES, page_routes
from aurora_rl.serving.http.prompts import Encoder
from aurora_rl.telemetry.history import RunHistory
from aurora_rl.telemetry.prometheus import Exporter


def create_app(
    engine: AsyncEngine,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    vocab_size: int,
    max_length: int,
    max_waiting: int,
    sampling: SamplingParams,
    history: RunHistory,
    metrics: Exporter,
    max_tokens: int | None = None,
    num_spec_tokens: int = 0,
    drafter_version: Callable[[], int] = lambda: 0,
    api_keys: Collection[str] = (),
    max_body: int = 1 << 20,
    timeout: float = 600.0,
    cors_origins: Sequence[str] = (),
) -> Starlette:
    """Build the application that serves OpenAI's API.

    Args:
        engine: Engine that generates.
        tokenizer: Tokenizer of the target.
        model: Name of the served model.
        vocab_size: Tokens that the target knows.
        max_length: Most tokens of prompt and completion.
        max_waiting: Requests that may wait in the engine.
        sampling: Temperature, top-k and top-p of requests that name none.
        max_tokens: Token budget of requests that name none; None takes what OpenAI's API says.
        history: What the run came to so far, for the live page at ``/``.
        metrics: What is exported for Prometheus at ``/metrics``.
        num_spec_tokens: Tokens of the longest path that is drafted.
        drafter_version: Returns the version of the weights that draft.
        api_keys: Bearer keys, which every path but ``/health`` and the page's files needs; none lets everyone in.
        max_body: Most bytes of a body.
        timeout: Most seconds of a request.
        cors_origins: Origins whose pages may call the server from a browser.
    """
    front = Front(
        engine,
        tokenizer,
        Encoder(
            tokenizer,
            model=model,
            vocab_size=vocab_size,
            max_length=max_length,
            max_waiting=max_waiting,
            sampling=sampling,
            max_tokens=max_tokens,
        ),
        model=model,
        max_length=max_length,
        max_body=max_body,
        timeout=timeout,
        metrics=metrics,
        drafter={
            "spell": lru_cache(1 << 16)(partial(token_bytes, tokenizer)),
            "num_spec_tokens": num_spec_tokens,
            "drafter_version": drafter_version,
        },
    )

    def load() -> dict[str, int]:
        return {"num_running": engine.num_running, "num_waiting": engine.num_waiting}

    routes = [*front.routes(), *page_routes(load, history, model)]
    return application(routes, load=load, failed=metrics.failed, api_keys=api_keys, cors_origins=cors_origins)


def application(
    routes: Sequence[BaseRoute],
    *,
    load: Callable[[], Mapping[str, int]],
    failed: Callable[[str], None],
    api_keys: Collection[str],
    cors_origins: Sequence[str],
) -> Starlette:
    """Build an application of these routes, with our keys and our errors.

    Args:
        routes: Routes of the application.
        load: Returns the running and waiting requests, ``num_running`` and ``num_waiting``; kept as ``state.load``.
        failed: Called with the code of the error where a key is missing or wrong.
        api_keys: Bearer keys, which every path but ``/health`` needs; none lets everyone in.
        cors_origins: Origins whose pages may call the server from a browser.
    """
    middleware = []
    if cors_origins:  # outermost: a browser asks without a key, and its page reads refusals too
        origins = list(cors_origins)
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
        )
    if api_keys:
        middleware.append(Middleware(Keys, keys=list(api_keys), open_paths=("/health", *FILES), failed=failed))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            errors.ApiError: errors.answer_api_error,
            HTTPException: errors.answer_http_exception,
            Exception: errors.answer_any_exception,
        },
    )
    app.router.redirect_slashes = False
    app.state.load = load
    return app
