"""Concurrent clients of an OpenAI server, streamed: in a closed loop or at Poisson arrivals, and what they measured.

They share the machine with the server, so they read as little as they can while it answers: bytes and when they came.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import numpy as np

from aurora_rl.workload.traffic import Prompt

_TIMEOUT_S = 600.0


@dataclass(slots=True)
class Answer:
    """What one request got; times are of `time.perf_counter`.

    `pieces` has the time of each piece with text. `usage` and `drafts` are what the server says of tokens and of
    speculation, null if it says nothing. `status` is null if there was no HTTP answer.
    """

    began: float
    ended: float = 0.0
    status: int | None = None
    pieces: list[float] = field(default_factory=list)
    text: str = ""
    usage: dict[str, int] | None = None
    drafts: dict[str, Any] | None = None
    finished: bool = False
    error: str | None = None

    @property
    def complete(self) -> bool:
        return self.finished and self.error is None

    def read(self, line: str, arrived: float) -> None:
        """Take a line of the stream."""
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        body = json.loads(line.removeprefix("data: "))
        if "error" in body:
            self.error = str(body["error"])
            return
        self.usage = body.get("usage") or self.usage
        self.drafts = body.get("metrics", {}).get("speculative_decoding") or self.drafts
        for choice in body["choices"]:
            if text := choice["delta"].get("content"):
                self.pieces.append(arrived)
                self.text += text
            self.finished |= choice.get("finish_reason") is not None


@dataclass(frozen=True, slots=True)
class Load:
    """Greedy chats for one server.

    `max_tokens` is the budget of prompts that have none of their own; `headers` go with each.
    """

    url: str
    max_tokens: int
    headers: Mapping[str, str] = field(default_factory=dict)

    async def closed_loop(self, prompts: Sequence[Prompt], clients: int) -> list[Answer]:
        """Ask all prompts by so many clients, each of which asks its next when it has its answer."""
        waiting = iter(prompts)

        async def client() -> list[Answer]:
            return [await self.ask(prompt) for prompt in waiting]

        return list(itertools.chain(*await asyncio.gather(*(client() for _ in range(clients)))))

    async def open_loop(self, prompts: Sequence[Prompt], arrivals: Sequence[float]) -> list[Answer]:
        """Ask each prompt at its arrival, in seconds from now, whatever became of those before it."""
        began = time.perf_counter()

        async def client(prompt: Prompt, arrival: float) -> Answer:
            await asyncio.sleep(began + arrival - time.perf_counter())
            return await self.ask(prompt)

        return await asyncio.gather(*map(client, prompts, arrivals))

    async def ask(self, prompt: Prompt) -> Answer:
        """Ask one prompt, by a connection of its own: some servers close kept ones as the next request comes."""
        body = {
            "messages": [dict(message) for message in prompt.messages],
            "max_tokens": prompt.max_tokens or self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        address, data = urlsplit(self.url), json.dumps(body).encode()
        named = {"Host": address.netloc, "Content-Type": "application/json", "Content-Length": str(len(data))}
        lines = [f"{name}: {value}" for name, value in {**named, "Connection": "close", **self.headers}.items()]
        head = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines, "", ""])
        answer, received = Answer(time.perf_counter()), list[tuple[bytes, float]]()
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(address.hostname, address.port)
                writer.write(head.encode() + data)
                while block := await reader.read(1 << 16):
                    received.append((block, time.perf_counter()))
                writer.close()
        except (OSError, TimeoutError) as error:
            answer.error = repr(error)
        answer.ended = time.perf_counter()
        _Response(answer).read(received)
        return answer


class _Response:
    """Reads an HTTP response into an answer, once it is there."""

    def __init__(self, answer: Answer) -> None:
        self._answer, self._arrived, self._line = answer, 0.0, b""
        self._parser = httptools.HttpResponseParser(self)

    def read(self, received: Sequence[tuple[bytes, float]]) -> None:
        """Read the blocks that came, each with the time at which it did."""
        try:
            for block, self._arrived in received:
                self._parser.feed_data(block)
        except httptools.HttpParserError as error:
            self._answer.error = self._answer.error or repr(error)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """Called by the parser."""
        if self._answer.status == 200:
            *lines, self._line = (self._line + data).split(b"\n")
            for line in lines:
                self._answer.read(line.decode().rstrip("\r"), self._arrived)


def poisson_arrivals(rate: float, count: int, seed: int = 0) -> list[float]:
    """Return the seconds at which requests arrive independently of each other, `rate` a second on average."""
    draw = random.Random(seed)
    return list(itertools.accumulate(draw.expovariate(rate) for _ in range(count)))


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Return p50, p95 and p99 in milliseconds; None of nothing."""
    if not seconds:
        return None
    values = np.percentile(seconds, (50, 95, 99)) * 1e3
    return dict(zip(("p50", "p95", "p99"), values.round(2).tolist(), strict=True))


def summary(answers: Sequence[Answer], count_tokens: Callable[[str], int]) -> dict[str, Any]:
    """Return the figures of a cell.

    `ttft_ms` is the time to the first piece with text. `tpot_ms` is a request's mean time per token after the first
    piece, and `itl_ms` the time between any two pieces, each of which may hold several tokens. All are over complete
    requests.

    Args:
        answers: All answers of the cell.
        count_tokens: Tokens of a text, for servers that tell no usage.
    """
    done = [answer for answer in answers if answer.complete]
    tokens = [a.usage["completion_tokens"] if a.usage else count_tokens(a.text) for a in done]
    seconds = max(answer.ended for answer in answers) - min(answer.began for answer in answers)
    drafts = [answer.drafts for answer in done if answer.drafts]
    steps = sum(each["num_spec_steps"] for each in drafts)
    rejected = sum(answer.status == 429 for answer in answers)
    return {
        "completed": len(done),
        "rejected_429": rejected,
        "failed": len(answers) - len(done) - rejected,
        "errors": sorted({answer.error for answer in answers if answer.error})[:3],
        "seconds": round(seconds, 3),
        "output_tokens": sum(tokens),
        "tokens_per_second": round(sum(tokens) / seconds, 2),
        "ttft_ms": percentiles([a.pieces[0] - a.began for a in done if a.pieces]),
        "tpot_ms": percentiles(
            [(a.pieces[-1] - a.pieces[0]) / (n - 1) for a, n in zip(done, tokens, strict=True) if a.pieces and n > 1]
        ),
        "itl_ms": percentiles([after - before for a in done for before, after in itertools.pairwise(a.pieces)]),
        "latency_ms": percentiles([a.ended - a.began for a in done]),
        "acceptance_length": 1 + sum(each["num_accepted_draft_tokens"] for each in drafts) / steps if steps else None,
    }
