"""Base of the applications in front of any engine: keys, bounds, errors, and the paths for operators."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from typing_extensions import override

import aurora_rl
from aurora_rl.serving.async_engine import UnavailableError
from aurora_rl.serving.http import errors
from aurora_rl.serving.http.keys import BearerKeys
from aurora_rl.serving.http.live_page import FILES, page_routes
from aurora_rl.telemetry.history import RunHistory
from aurora_rl.telemetry.prometheus import Exporter
from aurora_rl.workload.request_fields import FieldError

T = TypeVar("T")

_CORS_METHODS = ("GET", "POST", "DELETE")
# A client that sends too much is read on for a while: cut off at once, it would see a broken connection and no answer.
_DRAINED, _DRAIN_S = 8, 2.0


class _Cors(CORSMiddleware):
    """Starlette's, whose refusals have the form of all other errors."""

    @override
    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        origin, method = (request_headers[name][:200] for name in ("origin", "access-control-request-method"))
        message = (
            f"a page of {origin!r} may not send {method!r}: {bytes(answer.body).decode()}; this server takes "
            f"{', '.join(_CORS_METHODS)} from pages of the origins in http.cors_origins"
        )
        kept = {name: value for name, value in answer.headers.items() if not name.startswith("content-")}
        return errors.ApiError(answer.status_code, message, code="cors_refused", headers=kept).response()


class Application(ABC):
    """An application in front of an engine.

    Args:
        model: Name of the served model.
        history: What the run came to so far, for the live page at ``/``.
        metrics: What is exported for Prometheus at ``/metrics``.
        drafter_version: Returns the version of the weights that draft.
        api_keys: Bearer keys, which every path but ``/health`` and the page's files needs; none lets everyone in.
        max_body: Most bytes of a body.
        timeout: Most seconds of a request.
        cors_origins: Origins whose pages may call the server from a browser.
    """

    def __init__(
        self,
        *,
        model: str,
        history: RunHistory,
        metrics: Exporter,
        drafter_version: Callable[[], int] = lambda: 0,
        api_keys: Collection[str] = (),
        max_body: int = 1 << 20,
        timeout: float = 600.0,
        cors_origins: Sequence[str] = (),
    ) -> None:
        self._model, self._history, self._metrics, self._drafter_version = model, history, metrics, drafter_version
        self._api_keys, self._cors_origins = list(api_keys), list(cors_origins)
        self._max_body, self._timeout = max_body, timeout

    @abstractmethod
    def routes(self) -> list[BaseRoute]:
        """Return the routes of the engine's API."""

    @abstractmethod
    def load(self) -> dict[str, int]:
        """Return the running and waiting requests, ``num_running`` and ``num_waiting``."""

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """Return what ``/server_info`` tells of the engine."""

    @abstractmethod
    def counts(self) -> Mapping[str, float | None]:
        """Return the metrics that are numbers of this moment, see :meth:`Exporter.expose`."""

    def starlette(self) -> Starlette:
        """Return the application for an ASGI server."""
        middleware = []
        if self._cors_origins:  # outermost: a browser asks without a key, and its page reads refusals too
            middleware.append(
                Middleware(
                    _Cors,
                    allow_origins=self._cors_origins,
                    allow_methods=_CORS_METHODS,
                    allow_headers=["*"],
                    expose_headers=["Retry-After"],
                )  # fmt: skip
            )
        if self._api_keys:
            open_paths = ("/health", *FILES)
            middleware.append(
                Middleware(BearerKeys, keys=self._api_keys, open_paths=open_paths, failed=self._metrics.failed)
            )
        app = Starlette(
            routes=[
                *self.routes(),
                Route("/server_info", self._server_info, methods=["GET"]),
                Route("/metrics", self._exposed_metrics, methods=["GET"]),
                *page_routes(self.load, self._history, self._model),
            ],
            middleware=middleware,
            exception_handlers={
                errors.ApiError: errors.answer_request_error,
                FieldError: errors.answer_request_error,
                UnavailableError: errors.answer_request_error,
                errors.ClientGoneError: errors.answer_nobody,
                ClientDisconnect: errors.answer_nobody,
                HTTPException: errors.answer_http_exception,
                Exception: errors.answer_any_exception,
            },
        )
        app.router.redirect_slashes = False
        return app

    async def _server_info(self, request: Request) -> Response:
        info = {"model": self._model, **self.info(), "version": aurora_rl.__version__, **self.load()}
        return JSONResponse({**info, "drafter_version": self._drafter_version()})

    async def _exposed_metrics(self, request: Request) -> Response:
        return Response(self._metrics.expose(self.counts()), media_type=CONTENT_TYPE_LATEST)

    def _deadline(self) -> float:
        """Return the time of the event loop's clock by which a request that comes now must be answered."""
        return asyncio.get_running_loop().time() + self._timeout

    def _failed(self, error: Exception) -> errors.ApiError:
        """Count a request that failed, and return what its client is told."""
        answer = errors.of_engine(error)
        self._metrics.failed(answer.code or str(answer.status))
        return answer

    async def _body(self, request: Request) -> bytes:
        """Return the body of a request of JSON, read within the bounds of size and time.

        Raises:
            ApiError: Status 408 or 413 for a body that takes longer or is larger, 415 if it is not JSON.
            ClientDisconnect: The client left before it was complete.
        """
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # This also keeps pages of other origins out, which may send other types unasked.
        if media_type != "application/json":
            message = f"the content type is {media_type[:80]!r}; send 'Content-Type: application/json'"
            raise errors.ApiError(415, message)
        declared = request.headers.get("content-length", "")
        data = bytearray()
        try:
            async with asyncio.timeout(self._timeout):
                if declared.isdecimal() and int(declared) > self._max_body:
                    await _refuse(request, self._max_body)
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self._max_body:
                        await _refuse(request, self._max_body)
        except TimeoutError:
            raise errors.ApiError(408, f"the body was not complete after {self._timeout:g} s") from None
        return bytes(data)


async def _refuse(request: Request, limit: int) -> None:
    if "expect" not in request.headers:  # with it, the client has not sent the body
        left = _DRAINED * limit
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while left > 0 and (message := await request.receive()).get("more_body"):
                    left -= len(message["body"])
    raise errors.ApiError(413, f"the body has more than the {limit} bytes that http.max_body allows")


async def while_connected(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """Return the result of some work, and cancel it if the client leaves.

    ``receive`` is ASGI's source of events, after the request's body was read.

    Raises:
        ClientGoneError: The client has left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise errors.ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
