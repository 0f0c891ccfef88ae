"""A front for an SGLang server: keys and bounds are ours, the answers are SGLang's own."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import quote

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from typing_extensions import override

from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.serving.async_engine import QueueFullError
from aurora_rl.serving.http.app import Application, while_connected
from aurora_rl.serving.http.errors import ApiError, ClientGoneError, of_engine
from aurora_rl.serving.http.prompts import switch, tenant_of, tenant_to_delete
from aurora_rl.serving.http.schemas import json_object
from aurora_rl.serving.http.sglang_answer import SGLangAnswer
from aurora_rl.serving.http.streams import EventStream, event
from aurora_rl.telemetry.throttle import Throttle
from aurora_rl.tenants import joint_salt
from aurora_rl.workload.request_fields import FieldError, check_fields, refusal
from aurora_rl.workload.request_values import BUDGETS, boolean_field, budget_field, wrong

logger = logging.getLogger(__name__)
_throttle = Throttle(logger)

_CONNECT_S = 10.0
_HEALTH_S = 30.0  # SGLang itself gives up after 20
_GENERATE = ("/v1/chat/completions", "/v1/completions")
_OF_ERROR = ("message", "param", "code")
_UNLISTED = ("reasoning",)  # SGLang reads it, and does not describe it
# What SGLang applies otherwise with drafts than without, and the values that ask for nothing.
_COUNTS_NO_DRAFT = "SGLang, which counts no token of a draft when it verifies one"
_INEXACT: Mapping[str, tuple[tuple[float, ...], str]] = {
    "min_p": ((0,), "SGLang, which does not apply it when it verifies drafts"),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_tokens"), ((0,), _COUNTS_NO_DRAFT)),
    "repetition_penalty": ((1,), _COUNTS_NO_DRAFT),
}


class Proxy(Application):
    """The routes of the embedded engine's front, and no others of SGLang's, passed on to SGLang.

    Args:
        url: URL of the SGLang server.
        max_waiting: Requests that may wait at SGLang.
        num_slots: Returns how many requests SGLang decodes at the same time.
        num_spec_tokens: Returns the tokens of the longest path that is drafted.
        opt_out: Tenants whose requests are never captured.
        delete: Deletes what SGLang's plugin and the learner keep of a tenant, and says what was found there.
        **common: Further arguments of :class:`~aurora_rl.serving.http.app.Application`.
    """

    def __init__(
        self,
        url: str,
        *,
        max_waiting: int,
        num_slots: Callable[[], int],
        num_spec_tokens: Callable[[], int] = lambda: 0,
        opt_out: Collection[str] = (),
        delete: Callable[[str], dict[str, Any]],
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self._url, self._num_spec_tokens = url.rstrip("/"), num_spec_tokens
        self._opt_out, self._delete = frozenset(opt_out), delete
        self._max_waiting, self._num_slots, self._open = max_waiting, num_slots, 0  # requests that SGLang has of us
        self._cancelled = 0
        self._fields: dict[str, frozenset[str]] | None = None  # by path, once SGLang has said
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

    @override
    def routes(self) -> list[BaseRoute]:
        get, post = ["GET"], ["POST"]
        return [
            *(Route(path, self.generate, methods=post) for path in _GENERATE),
            *(Route(path, self.pass_on, methods=post) for path in ("/tokenize", "/detokenize")),
            *(Route(path, self.pass_on, methods=get) for path in ("/v1/models", "/health_generate")),
            Route("/v1/models/{model:path}", self.model, methods=get),
            Route("/health", self.health, methods=get),
            Route("/tenant_data", self.delete_tenant_data, methods=["DELETE"]),
        ]

    @override
    def load(self) -> dict[str, int]:
        running = min(self._open, self._num_slots())
        return {"num_running": running, "num_waiting": self._open - running}

    async def generate(self, request: Request) -> Response:
        """Pass on a request whose answer may be learned from."""
        deadline = self._deadline()
        try:
            fields = json_object(await self._body(request))
            if known := (await self._known_fields(deadline)).get(request.scope["path"]):
                fields = check_fields(_with_known_budget(fields, known), known, by="SGLang")
            answer = SGLangAnswer(
                translated(fields, request.headers, self._opt_out),
                observe=self._metrics.observe,
                num_spec_tokens=self._num_spec_tokens(),
                drafter_version=self._drafter_version,
            )
            return await self._forward(request, deadline, json.dumps(answer.fields).encode(), answer)
        except (ApiError, FieldError) as error:
            raise self._failed(error) from error

    async def pass_on(self, request: Request) -> Response:
        """Pass on a request that is not for a completion."""
        deadline = self._deadline()
        return await self._forward(request, deadline, await self._body(request) if request.method == "POST" else None)

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
        """Delete what is kept of a tenant's requests; those that run are completed and leave nothing."""
        tenant = tenant_to_delete(request.headers)
        try:
            deleted = await asyncio.to_thread(self._delete, tenant)
        except PluginError as error:
            raise ApiError(503, f"nothing was deleted: {error}") from error
        # SGLang's cache is emptied as a whole, once no request runs; and there are no answers to look up.
        return JSONResponse({"tenant": tenant, "prefixes": None, "answers": 0, **deleted})

    @override
    def info(self) -> dict[str, Any]:
        return {"engine": "sglang"}  # SGLang's own answer has all of its arguments, keys included

    @override
    def counts(self) -> dict[str, float | None]:
        load = self.load()
        return {
            "num_requests_running": load["num_running"],
            "num_requests_waiting": load["num_waiting"],
            "requests_cancelled_total": self._cancelled,
            "prefix_cache_queries_total": None,  # SGLang's own metrics have them
            "prefix_cache_hits_total": None,
        }

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
            raise
        except (TimeoutError, httpx.HTTPError) as error:
            self._cancelled += answer is not None and isinstance(error, TimeoutError)
            raise self._failure(error) from error
        if answer is not None and _is_stream(reply):
            return EventStream(self._events(exchange, answer, deadline), deadline)
        await exchange.aclose()
        if reply.is_error:
            raise _refusal_of(reply)
        content = reply.content
        if answer is not None:
            content = await asyncio.to_thread(answer.whole, content)  # it may hold megabytes of log-probabilities
        return Response(content, reply.status_code, media_type=reply.headers.get("content-type"))

    async def _known_fields(self, deadline: float) -> Mapping[str, frozenset[str]]:
        """Return the fields that SGLang takes, by path; a path of which it describes none is left out.

        SGLang itself ignores what it does not know, a misspelt field too.
        """
        if self._fields is None:
            try:
                async with asyncio.timeout_at(deadline):
                    reply = await self._http.get(f"{self._url}/openapi.json")
            except (TimeoutError, httpx.HTTPError) as error:
                raise self._failure(error) from error
            if reply.is_server_error:  # it starts, say, and is asked again
                return {}
            self._fields = _described(reply)
            if not self._fields:
                logger.warning("SGLang does not describe its API: fields that it does not know are not refused")
        return self._fields

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
                ended, failure = not isinstance(error, TimeoutError), self._failed(self._failure(error))
                yield answer.end() + f"{event(failure.body())}data: [DONE]\n\n".encode()
            finally:
                self._cancelled += not ended  # its client left, or its time ran out

    def _failure(self, error: Exception) -> ApiError:
        if isinstance(error, TimeoutError):
            return of_engine(error)
        _throttle.warning("no answer", "SGLang at %s does not answer: %s", self._url, str(error) or repr(error))
        return ApiError(502, "SGLang does not answer; try again later")


def _described(reply: httpx.Response) -> dict[str, frozenset[str]]:
    """Return the fields of bodies by path from a description of SGLang's API, in OpenAPI's form."""
    fields = {}
    try:
        api = reply.json()
        for path in _GENERATE:
            schema = api["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            described = api["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
            fields[path] = frozenset([*described, *_UNLISTED, "speculative", "learn"])
    except (ValueError, LookupError, TypeError, AttributeError):  # there is none, as with DISABLE_OPENAPI_DOC
        return {}
    return fields


def _with_known_budget(fields: Mapping[str, Any], known: Collection[str]) -> Mapping[str, Any]:
    """Return the fields with the token budget under the name that SGLang has for it on both paths."""
    name, alias = BUDGETS
    if fields.get(alias) is None or alias in known:
        return fields
    return {**{each: value for each, value in fields.items() if each != alias}, name: budget_field(fields)}


def _refusal_of(reply: httpx.Response) -> ApiError:
    """Return SGLang's error in OpenAI's form. SGLang's own is flat, and some of OpenAI's clients read nothing in it."""
    try:
        told = reply.json()
        told = told.get("error", told)
        message, param, code = (value if isinstance(value := told.get(name), str) else None for name in _OF_ERROR)
    except (ValueError, AttributeError):
        message = param = code = None
    message = message or f"SGLang answers with status {reply.status_code}; see its log"
    message = message.partition("\n\n  File ")[0]  # what it says of a wrong type ends in a place of its source
    headers = {"Retry-After": reply.headers["retry-after"]} if "retry-after" in reply.headers else {}
    return ApiError(reply.status_code, message, param=param, code=code, headers=headers)


def _is_stream(answer: httpx.Response) -> bool:
    return answer.is_success and answer.headers.get("content-type", "").startswith("text/event-stream")


def translated(fields: Mapping[str, Any], headers: Mapping[str, str], opt_out: Collection[str] = ()) -> dict[str, Any]:
    """Return a request's fields as SGLang takes them: ``learn`` is in ``custom_params``, the tenant in ``cache_salt``.

    Args:
        fields: Fields of the request's body.
        headers: Headers of the request, by lower-case name.
        opt_out: Tenants whose requests are never captured.

    Raises:
        FieldError: A switch, a salt or ``custom_params`` of a wrong type, ``speculative=false``, or what SGLang does
            not apply exactly to drafts: min-p in sampling, and penalties.
        ApiError: Status 400, for a tenant that is none.

    Example:
        >>> translated({"prompt": "a", "learn": False}, {"x-aurora-tenant": "b"})
        {'prompt': 'a', 'cache_salt': 'b@', 'custom_params': {'aurora_rl': False}}
    """
    passed = {name: value for name, value in fields.items() if name not in ("speculative", "learn")}
    speculative, learn = (boolean_field(fields, name) for name in ("speculative", "learn"))
    if not switch(speculative, headers, "x-aurora-speculative"):
        message = "speculative=false is not supported with engine.name=sglang, which drafts for all requests"
        raise FieldError(f"{message}: leave it out", "speculative", "unsupported_field")
    for name, (neutral, by) in _INEXACT.items():
        if name == "min_p" and fields.get("temperature") == 0:
            continue  # it excludes tokens that greedy decoding does not take
        if (reason := refusal(name, fields.get(name), {name: neutral}, by=by)) is not None:
            raise FieldError(reason, name, "unsupported_field")
    tenant, salt = tenant_of(headers), fields.get("cache_salt")
    if tenant is not None or salt is not None:
        passed["cache_salt"] = [_salt(tenant, s) for s in salt] if isinstance(salt, list) else _salt(tenant, salt)
    if not switch(learn, headers, "x-aurora-learn") or tenant in opt_out:
        params = fields.get("custom_params")
        if not isinstance(params, dict | None):
            raise wrong("custom_params", params, "give an object, or leave it out")
        passed["custom_params"] = {**(params or {}), "aurora_rl": False}
    return passed


def _salt(tenant: str | None, salt: Any) -> str | None:
    """Return a salt of a tenant's among those of all requests."""
    if not isinstance(salt, str | None):
        raise wrong("cache_salt", salt, "give a string, or a list of one for each prompt")
    return joint_salt(tenant, salt)
