"""A front for an SGLang server: keys and bounds are ours, the answers are SGLang's own."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import quote

import httpx
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

import aurora_rl
from aurora_rl.serving.async_engine import QueueFullError
from aurora_rl.serving.http.app import application
from aurora_rl.serving.http.errors import GONE, ApiError, of_engine, timed_out
from aurora_rl.serving.http.generation import ClientGoneError, while_connected
from aurora_rl.serving.http.live_page import page_routes
from aurora_rl.serving.http.prompts import switch, tenant_of
from aurora_rl.serving.http.reading import read_body
from aurora_rl.serving.http.schemas import json_object
from aurora_rl.serving.http.sglang_answer import SGLangAnswer
from aurora_rl.serving.http.streams import EventStream, event
from aurora_rl.telemetry.history import RunHistory
from aurora_rl.telemetry.prometheus import Exporter
from aurora_rl.tenants import joint_salt

logger = logging.getLogger(__name__)

_CONNECT_S = 10.0
_HEALTH_S = 30.0  # SGLang itself gives up after 20


def create_proxy(
    url: str,
    *,
    model: str,
    max_waiting: int,
    slots: Callable[[], int],
    history: RunHistory,
    metrics: Exporter,
    num_spec_tokens: Callable[[], int] = lambda: 0,
    drafter_version: Callable[[], int] = lambda: 0,
    api_keys: Collection[str] = (),
    max_body: int = 1 << 20,
    timeout: float = 600.0,
    cors_origins: Sequence[str] = (),
    opt_out: Collection[str] = (),
) -> Starlette:
    """Build the application that passes requests on to SGLang.

    Args:
        url: URL of the SGLang server.
        model: Name of the served model.
        max_waiting: Requests that may wait at SGLang.
        slots: Returns how many requests SGLang decodes at the same time.
        history: What the run came to so far, for the live page at ``/``.
        metrics: What is exported for Prometheus at ``/metrics``.
        num_spec_tokens: Returns the tokens of the longest path that is drafted.
        drafter_version: Returns the version of the weights that draft.
        api_keys: Bearer keys, which every path but ``/health`` and the page's files needs; none lets everyone in.
        max_body: Most bytes of a body.
        timeout: Most seconds of a request.
        cors_origins: Origins whose pages may call the server from a browser.
        opt_out: Tenants whose requests are never captured.
    """
    proxy = Proxy(
        url,
        model=model,
        max_waiting=max_waiting,
        slots=slots,
        metrics=metrics,
        num_spec_tokens=num_spec_tokens,
        drafter_version=drafter_version,
        max_body=max_body,
        timeout=timeout,
        opt_out=opt_out,
    )
    return application(
        [*proxy.routes(), *page_routes(proxy.load, history, model)],
        load=proxy.load,
        failed=metrics.failed,
        api_keys=api_keys,
        cors_origins=cors_origins,
    )


class Proxy:
    """The routes of the application: those of the embedded engine's front, and no others of SGLang's.

    Args:
        url: URL of the SGLang server.
        model: Name of the served model.
        max_waiting: Requests that may wait at SGLang.
        slots: Returns how many requests SGLang decodes at the same time.
        metrics: What is exported for Prometheus.
        num_spec_tokens: Returns the tokens of the longest path that is drafted.
        drafter_version: Returns the version of the weights that draft.
        max_body: Most bytes of a body.
        timeout: Most seconds of a request.
        opt_out: Tenants whose requests are never captured.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        max_waiting: int,
        slots: Callable[[], int],
        metrics: Exporter,
        num_spec_tokens: Callable[[], int],
        drafter_version: Callable[[], int],
        max_body: int,
        timeout: float,
        opt_out: Collection[str],
    ) -> None:
        self._opt_out = frozenset(opt_out)
        self._url, self._model, self._metrics = url.rstrip("/"), model, metrics
        self._num_spec_tokens, self._drafter_version = num_spec_tokens, drafter_version
        self._max_body, self._timeout = max_body, timeout
        self._max_waiting, self._slots, self._open = max_waiting, slots, 0  # requests that SGLang has of us
        self._cancelled = 0
        # A connection a request: a server ends idle ones whenever it likes, also while the next request is on its way.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        # Not through a proxy that the environment names, and without its passwords: prompts go to SGLang alone. A jar
        # would give one client's cookies to the next.
        self._http = httpx.AsyncClient(
            limits=limits,
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            trust_env=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        get, post = ["GET"], ["POST"]
        return [
            *(Route(path, self.generate, methods=post) for path in ("/v1/chat/completions", "/v1/completions")),
            *(Route(path, self.tokens, methods=post) for path in ("/tokenize", "/detokenize")),
            *(Route(path, self.fetch, methods=get) for path in ("/v1/models", "/health_generate")),
            Route("/v1/models/{model:path}", self.model, methods=get),
            Route("/health", self.health, methods=get),
            Route("/tenant_data", self.delete_tenant_data, methods=["DELETE"]),
            Route("/server_info", self.server_info, methods=get),
            Route("/metrics", self.metrics, methods=get),
        ]

    def load(self) -> dict[str, int]:
        """Return how many requests of our clients SGLang decodes, and how many wait there."""
        running = min(self._open, self._slots())
        return {"num_running": running, "num_waiting": self._open - running}

    async def generate(self, request: Request) -> Response:
        """Pass on a request whose answer may be learned from."""
        deadline = self._deadline()
        try:
            body = await read_body(request, self._max_body, self._timeout)
            answer = SGLangAnswer(
                translated(json_object(body), request.headers, self._opt_out),
                observe=self._metrics.observe,
                num_spec_tokens=self._num_spec_tokens(),
                drafter_version=self._drafter_version,
            )
            response = await self._forward(request, deadline, json.dumps(answer.fields).encode(), answer)
        except ClientDisconnect:
            return GONE
        except ApiError as error:
            self._metrics.failed(error.code or str(error.status))
            raise
        if response.status_code >= 400 and response is not GONE:
            self._metrics.failed(str(response.status_code))
        return response

    async def tokens(self, request: Request) -> Response:
        """Pass on a request about tokens and texts."""
        deadline = self._deadline()
        try:
            body = await read_body(request, self._max_body, self._timeout)
        except ClientDisconnect:
            return GONE
        return await self._forward(request, deadline, body)

    async def fetch(self, request: Request) -> Response:
        """Pass on a request without a body."""
        return await self._forward(request, self._deadline())

    async def model(self, request: Request) -> Response:
        """Pass on a question about one model."""
        name = quote(request.path_params["model"], safe="")  # quoted whole, it leads to no other path of SGLang's
        return await self._forward(request, self._deadline(), path=f"/v1/models/{name}")

    async def health(self, request: Request) -> Response:
        """Tell whether SGLang runs."""
        try:
            healthy = (await self._http.get(f"{self._url}/health", timeout=_HEALTH_S)).is_success
        except httpx.HTTPError:
            healthy = False
        if not healthy:
            raise ApiError(503, "SGLang does not answer, or not in good order; see its log")
        return Response()

    async def delete_tenant_data(self, request: Request) -> Response:
        """Say why nothing is deleted, and what to do."""
        raise ApiError(
            501,
            "SGLang's prefix cache and the plugin's records are not kept by tenant, so nothing was deleted. SGLang's "
            "/flush_cache empties the first; trajectories are gone from the learner once privacy.max_age has passed, "
            "or once it is started again",
            code="not_supported",
        )

    async def server_info(self, request: Request) -> Response:
        """Tell what is served. SGLang's own answer has all of its arguments, keys included."""
        info = {"model": self._model, "engine": "sglang", "version": aurora_rl.__version__}
        return JSONResponse({**info, **self.load(), "drafter_version": self._drafter_version()})

    async def metrics(self, request: Request) -> Response:
        """Return the metrics for Prometheus."""
        load = self.load()
        counts: dict[str, float | None] = {
            "num_requests_running": load["num_running"],
            "num_requests_waiting": load["num_waiting"],
            "requests_cancelled_total": self._cancelled,
            "prefix_cache_queries_total": None,  # SGLang's own metrics have them
            "prefix_cache_hits_total": None,
        }
        return Response(self._metrics.expose(counts), media_type=CONTENT_TYPE_LATEST)

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout

    async def _forward(
        self,
        request: Request,
        deadline: float,
        body: bytes | None = None,
        answer: SGLangAnswer | None = None,
        *,
        path: str | None = None,
    ) -> Response:
        """Ask SGLang, and answer with what it answers; a client that leaves ends SGLang's work, too."""
        # Not request.url, which older releases of Starlette make of the Host header.
        exchange = self._exchange(request.method, path or request.scope["path"], body, generates=answer is not None)
        try:
            async with asyncio.timeout_at(deadline):
                reply = await while_connected(request.receive, anext(exchange))
        except ClientGoneError:
            self._cancelled += answer is not None
            return GONE
        except (TimeoutError, httpx.HTTPError) as error:
            self._cancelled += answer is not None and isinstance(error, TimeoutError)
            raise self._failure(error) from error
        if answer is not None and _is_stream(reply):
            return EventStream(self._events(exchange, answer, deadline), deadline)
        await exchange.aclose()
        kept = {name: reply.headers[name] for name in ("content-type", "retry-after") if name in reply.headers}
        content = answer.whole(reply.content) if answer is not None and reply.is_success else reply.content
        return Response(content, reply.status_code, headers=kept)

    async def _exchange(
        self, method: str, path: str, body: bytes | None, *, generates: bool
    ) -> AsyncGenerator[Any, None]:
        """Yield SGLang's answer, complete unless it is a stream of tokens, and then the pieces of the stream."""
        headers = {"Accept-Encoding": "identity"} | ({} if body is None else {"Content-Type": "application/json"})
        if generates and (waiting := self.load()["num_waiting"]) >= self._max_waiting:
            raise of_engine(QueueFullError(waiting, self._max_waiting))
        self._open += generates
        try:
            async with self._http.stream(method, self._url + path, content=body, headers=headers) as reply:
                if not (generates and _is_stream(reply)):
                    await reply.aread()
                yield reply
                async for piece in reply.aiter_raw():
                    yield piece
        finally:
            self._open -= generates

    async def _events(
        self, exchange: AsyncGenerator[Any, None], answer: SGLangAnswer, deadline: float
    ) -> AsyncGenerator[str | bytes, None]:
        ended = False
        async with aclosing(exchange):
            try:
                while True:
                    async with asyncio.timeout_at(deadline):
                        piece = await anext(exchange, None)
                    if piece is None:
                        ended = True
                        answer.completed()
                        if last := answer.end():
                            yield last
                        return
                    if events := answer.feed(piece):
                        yield events
            except (TimeoutError, httpx.HTTPError) as error:  # the status is sent, and the client is told in the stream
                ended, failure = not isinstance(error, TimeoutError), self._failure(error)
                self._metrics.failed(failure.code or str(failure.status))
                yield answer.end() + f"{event(failure.body())}data: [DONE]\n\n".encode()
            finally:
                self._cancelled += not ended  # its client left, or its time ran out

    def _failure(self, error: Exception) -> ApiError:
        if isinstance(error, TimeoutError):
            return timed_out()
        logger.warning("SGLang at %s does not answer: %s", self._url, str(error) or repr(error))
        return ApiError(502, "SGLang does not answer; try again later")


def _is_stream(answer: httpx.Response) -> bool:
    return answer.is_success and answer.headers.get("content-type", "").startswith("text/event-stream")


def translated(fields: Mapping[str, Any], headers: Mapping[str, str], opt_out: Collection[str] = ()) -> dict[str, Any]:
    """Return a request's fields as SGLang takes them: ``learn`` is in ``custom_params``, the tenant in ``cache_salt``.

    Args:
        fields: Fields of the request's body.
        headers: Headers of the request, by lower-case name.
        opt_out: Tenants whose requests are never captured.

    Raises:
        ApiError: Status 400, for a switch or a tenant that is none, or ``speculative=false``.

    Example:
        >>> translated({"prompt": "a", "learn": False}, {"x-aurora-tenant": "b"})
        {'prompt': 'a', 'cache_salt': 'b@', 'custom_params': {'aurora_rl': False}}
    """
    passed = {name: value for name, value in fields.items() if name not in ("speculative", "learn")}
    for name in ("speculative", "learn"):
        if not isinstance(value := fields.get(name), bool | None):
            raise ApiError(400, f"{name} is {value!r}: give true or false", param=name, code="invalid_value")
    if not switch(fields.get("speculative"), headers, "x-aurora-speculative"):
        message = (
            "speculative=false is not supported with engine.name=sglang, which drafts for all requests: leave it out"
        )
        raise ApiError(400, message, param="speculative", code="unsupported_field")
    tenant, salt = tenant_of(headers), fields.get("cache_salt")
    if tenant is not None or salt is not None:
        passed["cache_salt"] = [_salt(tenant, s) for s in salt] if isinstance(salt, list) else _salt(tenant, salt)
    if not switch(fields.get("learn"), headers, "x-aurora-learn") or tenant in opt_out:
        params = fields.get("custom_params") or {}
        if not isinstance(params, dict):
            raise ApiError(400, "custom_params must be an object", param="custom_params", code="invalid_value")
        passed["custom_params"] = {**params, "aurora_rl": False}
    return passed


def _salt(tenant: str | None, salt: Any) -> str | None:
    """Return a salt of a tenant's among those of all requests."""
    if not isinstance(salt, str | None):
        message = f"cache_salt is {salt!r:.60}: give a string, or a list of one for each prompt"
        raise ApiError(400, message, param="cache_salt", code="invalid_value")
    return joint_salt(tenant, salt)
