"""The front of the engine in this process: what each path of OpenAI's API does."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from aurora_rl.envs import Completion, SamplingParams
from aurora_rl.models.detokenizer import token_bytes
from aurora_rl.serving.async_engine import AsyncEngine, Job, QueueFullError
from aurora_rl.serving.http.app import Application, while_connected
from aurora_rl.serving.http.bodies import Bodies, ChatBodies, TextBodies
from aurora_rl.serving.http.errors import ApiError, ClientGoneError, of_engine
from aurora_rl.serving.http.prompts import Encoder, tenant_to_delete
from aurora_rl.serving.http.schemas import ChatCompletionBody, CompletionBody, Detokenize, Tokenize, parse
from aurora_rl.serving.http.streams import EventStream, Parts, events

T = TypeVar("T")

_HEALTH_S = 20.0
_LOOK_S = 0.02  # between two looks for a token


class Front(Application):
    """OpenAI's API over an engine in this process.

    Args:
        engine: Engine that generates.
        tokenizer: Tokenizer of the target.
        vocab_size: Tokens that the target knows.
        max_length: Most tokens of prompt and completion.
        max_waiting: Requests that may wait in the engine.
        sampling_params: Temperature, min-p, top-k and top-p of requests that name none.
        max_tokens: Token budget of requests that name none; None takes what OpenAI's API says.
        num_spec_tokens: Returns the tokens of the longest path that is drafted.
        **common: Further arguments of :class:`~aurora_rl.serving.http.app.Application`.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        max_length: int,
        max_waiting: int,
        sampling_params: SamplingParams,
        max_tokens: int | None = None,
        num_spec_tokens: Callable[[], int] = lambda: 0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self._engine, self._tokenizer, self._max_length = engine, tokenizer, max_length
        self._encoder = Encoder(
            tokenizer,
            model=self._model,
            vocab_size=vocab_size,
            max_length=max_length,
            max_waiting=max_waiting,
            sampling_params=sampling_params,
            max_tokens=max_tokens,
        )
        self._drafter: dict[str, Any] = {
            "spell": lru_cache(1 << 16)(partial(token_bytes, tokenizer)),
            "num_spec_tokens": num_spec_tokens,
            "drafter_version": self._drafter_version,
        }
        self._created = int(time.time())
        # Bodies are parsed and encoded next to the event loop, in one thread. Texts that are only to be counted may be
        # as long as a body, and have a thread of their own. They may share a tokenizer whose settings nobody changes.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._counter = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    @override
    def routes(self) -> list[BaseRoute]:
        get, post = ["GET"], ["POST"]
        return [
            Route("/v1/chat/completions", self.chat_completions, methods=post),
            Route("/v1/completions", self.completions, methods=post),
            Route("/v1/models", self.models, methods=get),
            Route("/v1/models/{model:path}", self.model, methods=get),
            Route("/tokenize", self.tokenize, methods=post),
            Route("/detokenize", self.detokenize, methods=post),
            Route("/health", self.health, methods=get),
            Route("/health_generate", self.health_generate, methods=get),
            Route("/tenant_data", self.delete_tenant_data, methods=["DELETE"]),
        ]

    @override
    def load(self) -> dict[str, int]:
        return {"num_running": self._engine.num_running, "num_waiting": self._engine.num_waiting}

    @override
    def info(self) -> dict[str, Any]:
        return {"max_model_len": self._max_length}

    @override
    def counts(self) -> Mapping[str, float | None]:
        return self._engine.counts()

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, ChatCompletionBody, ChatBodies)

    async def completions(self, request: Request) -> Response:
        """Continue texts or tokens."""
        return await self._answer(request, CompletionBody, TextBodies)

    async def models(self, request: Request) -> Response:
        """List the served model."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """Describe the served model."""
        self._encoder.check_model(request.path_params["model"])
        return JSONResponse(self._card())

    async def tokenize(self, request: Request) -> Response:
        """Return the tokens of a text or of a conversation."""

        def encode(data: bytes) -> dict[str, Any]:
            body = parse(data, Tokenize)
            tokens = self._encoder.tokenize(body)
            strings = self._encoder.token_strings(tokens) if body.return_token_strs else None
            return {
                "count": len(tokens), "max_model_len": self._max_length, "tokens": tokens, "token_strs": strings,
            }  # fmt: skip

        return await self._work(request, encode)

    async def detokenize(self, request: Request) -> Response:
        """Return the text of tokens."""
        return await self._work(request, lambda data: {"prompt": self._encoder.detokenize(parse(data, Detokenize))})

    async def health(self, request: Request) -> Response:
        """Tell whether the engine runs."""
        self._engine.check_alive()
        return Response()

    async def health_generate(self, request: Request) -> Response:
        """Tell whether the engine works: whether a round delivers a token, to whomever, after it was asked for one."""
        await while_connected(request.receive, self._token_delivered())
        return Response()

    async def _token_delivered(self) -> None:
        """Wait for a token, of a request of our own if there is room for it in the queue."""
        loop, before = asyncio.get_running_loop(), self._engine.delivered
        deadline = loop.time() + _HEALTH_S
        sampling = SamplingParams(max_tokens=1)
        job = Job(torch.zeros(1, dtype=torch.int64), sampling, speculative=False, learn=False, counted=False)
        asked = asyncio.ensure_future(complete(self._engine, [job], math.inf))
        try:
            while self._engine.delivered == before:
                if asked.done() and not isinstance(error := asked.exception(), QueueFullError):
                    if error is None:
                        return
                    reason = of_engine(error if isinstance(error, Exception) else RuntimeError(repr(error)))
                    message = f"no token was generated: {reason.message}"
                    raise ApiError(503, message, code=reason.code, headers=reason.headers)
                if loop.time() > deadline:
                    message = f"no round has delivered a token within {_HEALTH_S:g} s; see the server's log"
                    raise ApiError(503, message, code="no_token")
                await asyncio.sleep(_LOOK_S)
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    async def delete_tenant_data(self, request: Request) -> Response:
        """Delete what is kept of a tenant's requests that ended."""
        tenant = tenant_to_delete(request.headers)
        try:
            async with asyncio.timeout(self._timeout):
                deleted = await while_connected(request.receive, self._engine.delete(tenant))
        except TimeoutError:
            message = "the tenant's requests in flight took longer than http.timeout; they go on, and deletion follows"
            raise ApiError(504, message) from None
        return JSONResponse({"tenant": tenant, **asdict(deleted)})

    async def _answer(
        self, request: Request, schema: type[ChatCompletionBody | CompletionBody], kind: type[Bodies]
    ) -> Response:
        deadline = self._deadline()

        def prepare(data: bytes) -> tuple[ChatCompletionBody | CompletionBody, list[Job]]:
            body = parse(data, schema)
            return body, self._encoder.jobs(body, request.headers)

        try:
            data = await self._body(request)
            body, jobs = await asyncio.get_running_loop().run_in_executor(self._worker, prepare, data)
            bodies = kind(self._model, self._tokenizer, **self._drafter)
            if not body.stream:
                return Parts(await while_connected(request.receive, self._whole(jobs, bodies, deadline)))
            updates = self._engine.generate(jobs, deadline)
            # The status is known with the first tokens: a full queue, say, is told by it.
            first = await while_connected(request.receive, anext(updates))
            stream = events(
                _rejoined(first, updates), jobs, bodies, self._tokenizer,
                include_usage=body.include_usage, failed=self._failed,
            )  # fmt: skip
            return EventStream(stream, deadline)
        except (ClientDisconnect, ClientGoneError):
            raise
        except Exception as error:
            raise self._failed(error) from error

    async def _whole(self, jobs: Sequence[Job], bodies: Bodies, deadline: float) -> list[bytes]:
        """Return the parts of an answer that is not streamed, encoded one after the other next to the event loop."""
        done, loop = await complete(self._engine, jobs, deadline), asyncio.get_running_loop()
        async with asyncio.timeout_at(deadline):
            choices = range(len(jobs))
            return [await loop.run_in_executor(self._worker, bodies.part, each, jobs, done) for each in choices]

    async def _work(self, request: Request, answer: Callable[[bytes], dict[str, Any]]) -> Response:
        """Answer a body in the thread of /tokenize and /detokenize."""
        data, loop = await self._body(request), asyncio.get_running_loop()
        return await loop.run_in_executor(self._counter, lambda: JSONResponse(answer(data)))

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model, "object": "model", "created": self._created, "owned_by": "aurora-rl",
            "root": self._model, "parent": None, "max_model_len": self._max_length,
        }  # fmt: skip


async def _rejoined(first: T, rest: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    async with aclosing(rest):
        yield first
        async for each in rest:
            yield each


async def complete(engine: AsyncEngine, jobs: Sequence[Job], deadline: float) -> list[Completion]:
    """Return the completions of all jobs, in their order.

    Raises:
        TimeoutError: The deadline, a time of the event loop's clock, has passed.
        Exception: The first error of the engine at one of the jobs.
    """
    done: dict[int, Completion] = {}
    async with aclosing(engine.generate(jobs, deadline)) as updates:
        async for index, update in updates:
            if update.completion is not None:
                done[index] = update.completion
    return [done[index] for index in range(len(jobs))]
