"""Bodies of requests, read within bounds of size and time."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.requests import Request

from aurora_rl.serving.http.errors import ApiError

# A client that sends too much is read on for a while: cut off at once, it would see a broken connection and no answer.
_DRAINED, _DRAIN_S = 8, 2.0


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """Return the body of a request of JSON, of at most ``limit`` bytes, within some seconds.

    Raises:
        ApiError: Status 408 or 413 for a body that takes longer or is larger, 415 if it is not JSON.
        ClientDisconnect: The client left before it was complete.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":  # also keeps pages of other origins out, which may send other types unasked
        raise ApiError(415, f"the content type is {media_type[:80]!r}; send 'Content-Type: application/json'")
    declared = request.headers.get("content-length", "")
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            if declared.isdecimal() and int(declared) > limit:
                await _refuse(request, limit)
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    await _refuse(request, limit)
    except TimeoutError:
        raise ApiError(408, f"the body was not complete after {seconds:g} s") from None
    return bytes(data)


async def _refuse(request: Request, limit: int) -> None:
    if "expect" not in request.headers:  # with it, the client has not sent the body
        left = _DRAINED * limit
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while left > 0 and (message := await request.receive()).get("more_body"):
                    left -= len(message["body"])
    raise ApiError(413, f"the body has more than the {limit} bytes that http.max_body allows")
