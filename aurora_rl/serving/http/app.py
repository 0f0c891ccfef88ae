"""Base of the applications in front of any engine: keys, bounds, errors, and the paths for operators."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

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
from aurora_rl.serving.http import errors
from aurora_rl.serving.http.keys import BearerKeys
from aurora_rl.serving.http.live_page import FILES, page_routes
from aurora_rl.serving.http.reading import read_body
from aurora_rl.telemetry.history import RunHistory
from aurora_rl.telemetry.prometheus import Exporter
from aurora_rl.workload.request_fields import FieldError

_CORS_METHODS = ("GET", "POST", "DELETE")


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
        return await read_body(request, self._max_body, self._timeout)
