"""A server that stands where SGLang does: it answers by the field `do` of a body."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from aurora_rl.serving.http.server import HttpServer

CHAT = "/v1/chat/completions"
ANSWER = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [
    {"index": 0, "message": {"role": "assistant", "content": "hällo"}, "finish_reason": "stop"}]}  # fmt: skip
WRONG = "1 validation error:\n  {'type': 'int_parsing', 'loc': ('body', 'n')}"
REFUSAL = {
    "object": "error", "message": f'{WRONG}\n\n  File "/opt/sglang/http_server.py", line 1777, in openai',
    "type": "BadRequestError", "param": None, "code": 400,
}  # fmt: skip
# What SGLang 0.5.21 says of the drafts of a choice if it is asked: 11 tokens in four passes of chains of three.
DETAILS = {
    "spec_accept_rate": 0.5, "spec_accept_length": 2.75, "spec_num_correct_drafts": 6, "spec_num_proposed_drafts": 12,
    "spec_verify_ct": 4, "spec_correct_drafts_histogram": [1, 1, 1, 1], "spec_cap_lens_histogram": [],
}  # fmt: skip
BLOCK = {
    "speculative_decoding": {
        "mean_acceptance_length": 2.5, "draft_acceptance_rate": 0.5, "acceptance_histogram": [1, 1, 1, 1, 0],
        "num_spec_steps": 4, "num_accepted_draft_tokens": 6, "num_draft_tokens": 12, "num_spec_tokens": 4,
    },
    "drafter_version": 7,
}  # fmt: skip


class Upstream:
    """Answers by the field `do` of a body, and notes what came.

    Attributes:
        api: What it says of its own API, in OpenAPI's form; None if it does not.
        bodies: Bodies, as bytes.
        cookies: Cookies that came with each request.
        paths: Paths that were asked for.
        left: Set when a client has left before its answer was complete.
    """

    def __init__(self) -> None:
        self.api: dict[str, Any] | None = None
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.cookies: list[str | None] = []
        self.left = threading.Event()
        self._server = HttpServer("127.0.0.1", 0)
        methods = ["GET", "POST"]
        self._server.start(Starlette(routes=[Route("/{path:path}", self.answer, methods=methods)]))
        self.url = self._server.url

    async def answer(self, request: Request) -> Response:
        if request.scope["path"] == "/openapi.json":
            return Response(status_code=404) if self.api is None else JSONResponse(self.api)
        self.paths.append(request.scope["path"])
        self.cookies.append(request.headers.get("cookie"))
        self.bodies.append(await request.body())
        fields = json.loads(self.bodies[-1] or b"{}")
        match fields.get("do"):
            case "refuse":
                return JSONResponse(REFUSAL, 400, headers={"Retry-After": "7"})
            case "fail":
                return Response("Internal Server Error", 500)
            case "cookie":
                return JSONResponse(ANSWER, headers={"Set-Cookie": "route=node1"})
            case "hang":
                while not await request.is_disconnected():
                    await asyncio.sleep(0.01)
                self.left.set()
        if fields.get("stream"):
            return StreamingResponse(self._events(fields), media_type="text/event-stream")
        return JSONResponse(ANSWER | self._details(fields))

    def _details(self, fields: dict[str, Any]) -> dict[str, Any]:
        if fields.get("do") != "draft" or not fields.get("return_spec_tokens_details"):
            return {}
        n = fields.get("n", 1)
        return {"sglext": {"spec_tokens_details": DETAILS if n == 1 else [DETAILS] * n}}

    async def _events(self, fields: dict[str, Any]) -> AsyncIterator[str]:
        try:
            for text in ("one", "two"):
                chunk = ANSWER | {"choices": [{"index": 0, "delta": {"content": text}}]}
                yield f"data: {json.dumps(chunk)}\n\n"
                if fields.get("do") == "stall":
                    await asyncio.sleep(30)
                if fields.get("do") == "break":
                    raise asyncio.CancelledError  # the connection is closed
            if fields.get("do") == "draft":
                for said in self._end(fields):
                    yield f"data: {json.dumps(said)}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.set()
            raise

    def _end(self, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """In SGLang's order: why it ended, what became of the drafts, and the usage."""
        yield ANSWER | {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
        if details := self._details(fields):
            yield ANSWER | {"choices": [], **details}
        if (fields.get("stream_options") or {}).get("include_usage"):
            yield ANSWER | {"choices": [], "usage": {"completion_tokens": 11}}

    def stop(self) -> None:
        self._server.stop()


def post(url: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(url + CHAT, json=body, headers=headers, timeout=30)
