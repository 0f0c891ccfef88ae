"""Answers in pieces: streams of server-sent events, and long bodies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from aurora_rl.envs import Completion
from aurora_rl.models.detokenizer import Detokenizer
from aurora_rl.serving.async_engine import Job, Update
from aurora_rl.serving.http.bodies import Bodies
from aurora_rl.serving.http.errors import ApiError

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
# Some clients take these for the ends of lines, which JSON does not.
_LINE_ENDS = str.maketrans({each: f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"})
# A client that reads nothing holds its connection so much longer than the request may take.
_GRACE_S = 30.0


def event(body: Any) -> str:
    r"""Return a body as one server-sent event.

    Example:
        >>> event({"a": "é"})
        'data: {"a":"é"}\n\n'
    """
    return f"data: {_JSON.encode(body).translate(_LINE_ENDS)}\n\n"


class EventStream(StreamingResponse):
    """A response of server-sent events, which closes their generator when the client leaves.

    The last event is to be there at ``deadline`` of the event loop's clock.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str | bytes, None], deadline: float) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers)
        self._events, self._deadline = events, deadline

    @override
    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            try:
                async with asyncio.timeout_at(self._deadline + _GRACE_S):
                    await super().stream_response(send)
            except TimeoutError:  # uvicorn closes a connection whose answer is not complete
                return


class Parts(Response):
    """A response of JSON that is sent part after part, as fast as its client reads."""

    media_type = "application/json"

    def __init__(self, parts: Sequence[bytes]) -> None:
        super().__init__(headers={"Content-Length": str(sum(map(len, parts)))})
        self._parts = parts

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for part in self._parts[:-1]:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": self._parts[-1]})


class _Choice:
    """Progress of one choice: the pieces sent so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, job: Job) -> None:
        self.detokenizer = Detokenizer(tokenizer, job.sampling_params.stop)
        self.begun, self.characters = False, 0


async def events(
    updates: AsyncIterator[tuple[int, Update]],
    jobs: Sequence[Job],
    bodies: Bodies,
    tokenizer: PreTrainedTokenizerBase,
    *,
    include_usage: bool,
    failed: Callable[[Exception], ApiError],
) -> AsyncGenerator[str, None]:
    """Yield the events of a stream: what each round added to one of the jobs, with its index.

    With ``include_usage`` a last piece brings the usage, and the other ones say that it is to come. ``failed`` is
    called with an error, and returns what the client is told.
    """
    choices = [_Choice(tokenizer, job) for job in jobs]
    done: dict[int, Completion] = {}
    usage = {"usage": None} if include_usage else {}
    try:
        async for index, update in updates:
            choice, completion, logprobs = choices[index], update.completion, None
            text = choice.detokenizer.feed(update.tokens)
            if update.logprobs is not None:
                logprobs = bodies.logprobs(update.tokens, update.logprobs, choice.characters)
                choice.characters += sum(map(len, logprobs.get("tokens", ())))
            said = ""
            if not choice.begun:
                choice.begun = True
                said = event({**bodies.chunk(index, "", first=True), **usage})
            if completion is not None:
                done[index] = completion
                text += choice.detokenizer.finish()
                body = {**bodies.chunk(index, text, logprobs, finish_reason=completion.finish_reason), **usage}
                if len(done) == len(jobs) and not include_usage:
                    body["metrics"] = bodies.metrics([done[each] for each in range(len(jobs))])
                said += event(body)
            elif text or logprobs is not None:
                said += event({**bodies.chunk(index, text, logprobs), **usage})
            if said:
                yield said
        if include_usage:
            yield event(bodies.usage_chunk(jobs, [done[each] for each in range(len(jobs))]))
    except Exception as error:  # the status is sent, and the client is told in the stream
        yield event(failed(error).body())
    yield "data: [DONE]\n\n"
