"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from aurora_rl.serving.async_engine import QueueFullError, RefusedError, ShuttingDownError, UnavailableError
from aurora_rl.workload.request_fields import FieldError

logger = logging.getLogger(__name__)

# The usual type and code of an error, by its status.
_USUAL = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal_error"),
    502: ("server_error", "bad_gateway"),
    503: ("server_error", "unavailable"),
    504: ("timeout_error", "timeout"),
}


class ClientGoneError(Exception):
    """The client has closed its connection."""


class ApiError(Exception):
    """A request that gets an error for an answer.

    Args:
        status: HTTP status.
        message: What is wrong, the value, and the fix.
        param: Field of the request's body that is wrong; None if it is none of them.
        code: Code for programs; None takes the usual code of the status.
        headers: Further headers of the answer.

    Example:
        >>> ApiError(404, "no such model", param="model", code="model_not_found").body()["error"]["type"]
        'not_found_error'
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, usual = _USUAL.get(status, ("invalid_request_error", None))
        self.status, self.message, self.param, self.code = status, message, param, code or usual
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def of_engine(error: Exception) -> ApiError:
    """Return the answer to a request that failed in the engine or while it was waited for."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FieldError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, RefusedError):
        return ApiError(400, str(error))
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than http.timeout allows; ask for fewer tokens")
    if isinstance(error, QueueFullError):
        return ApiError(429, f"{error}; try again later", headers={"Retry-After": "1"})
    if isinstance(error, UnavailableError):
        code = "shutting_down" if isinstance(error, ShuttingDownError) else "engine_dead"
        return ApiError(503, str(error), code=code, headers={"Retry-After": "5"})
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why")


async def answer_request_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of :class:`ApiError`, of fields that are refused, and of an engine that takes no requests."""
    return of_engine(error).response()


async def answer_nobody(request: Request, error: Exception) -> Response:
    """Starlette's handler of a client that has left: nobody reads the answer, for which nginx has this status."""
    return Response(status_code=499)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler of its own errors: an unknown path, and a method that a path does not take."""
    assert isinstance(error, HTTPException)
    path, message = request.url.path, error.detail
    if error.status_code == 404:
        message = f"there is nothing at {path}; the paths of OpenAI's API begin with /v1"
    elif error.status_code == 405:
        message = f"{path} does not take {request.method}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def answer_any_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler of everything else; Starlette raises the error again, and uvicorn logs it."""
    return ApiError(500, "the server failed on this request; its log says why").response()
