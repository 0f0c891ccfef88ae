"""Clients that no server can choose: they leave, send junk, say too much, or never finish what they began to say."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_BODY = 1 << 16  # bytes that the server takes
_ANSWER_S = 90.0
_CHAT = "/v1/chat/completions"
_HELLO: list[Any] = [{"role": "user", "content": "Hello."}]
_BAD: list[bytes] = [
    *(b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 20000, b'{"messages": [', b'{"messages": "hello"}'),
    *(
        json.dumps(body).encode()
        for body in (
            {"messages": []},
            {"messages": [{"role": "wizard", "content": "Hello."}]},
            {"messages": [{"role": "user", "content": {"text": "Hello."}}]},
            {"messages": [{"role": "user", "content": "Hello. " * 4000}]},
            {"messages": [{"role": "user", "content": ""}] * 1500},
            {"messages": _HELLO, "max_tokens": -1},
            {"messages": _HELLO, "temperature": float("nan")},
            {"messages": _HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]},
            {"messages": _HELLO, "mood": "bad"},
            {"messages": _HELLO, "model": 3},
        )
    ),
]


@dataclass(frozen=True, slots=True)
class Stranger:
    """One such client: the port that it calls, what it talks about, and its random numbers."""

    port: int
    chats: Sequence[Any]
    draw: random.Random = field(default_factory=random.Random)

    @asynccontextmanager
    async def call(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Connect, and hang up with or without a word."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            if self.draw.random() < 0.5:
                writer.transport.abort()
            else:
                writer.close()

    def chat(self, **settings: Any) -> bytes:
        body = {"messages": [dict(message) for message in self.draw.choice(self.chats)], "max_tokens": 64, **settings}
        return json.dumps(body).encode()

    async def vanish(self) -> str:
        """Leave in the middle of a stream, at times before its first piece is read."""
        async with self.call() as (reader, writer):
            writer.write(_post(self.chat(stream=True)))
            status = await _status(reader)
            for _ in range(self.draw.randrange(12)):
                await reader.readline()
            await asyncio.sleep(self.draw.random())
        return status

    async def leave_early(self) -> str:
        """Ask, and leave before there is an answer."""
        async with self.call() as (_, writer):
            writer.write(_post(self.chat()))
            await asyncio.sleep(self.draw.random() / 2)
        return "left"

    async def send_junk(self) -> str:
        """Send bytes that are no HTTP, or that stop to be after the first line."""
        async with self.call() as (reader, writer):
            begin = self.draw.choice([b"", b"POST ", f"POST {_CHAT} HTTP/1.1\r\n".encode()])
            writer.write(begin + self.draw.randbytes(self.draw.randrange(1, 2000)))
            writer.write_eof()
            return await _status(reader)

    async def send_too_much(self) -> str:
        """Send a body beyond the limit, declared or in chunks, or only declare one."""
        async with self.call() as (reader, writer):
            kind, body = self.draw.randrange(3), b" " * (2 * MAX_BODY)
            if kind == 0:
                writer.write(_post(body))
            elif kind == 1:
                writer.write(_post(b"", "Transfer-Encoding: chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            else:
                writer.write(_post(b"", f"Content-Length: {1 << 40}"))
            return await _status(reader)

    async def ask_badly(self) -> str:
        """Send a body that is no request."""
        async with self.call() as (reader, writer):
            writer.write(_post(self.draw.choice(_BAD)))
            return await _status(reader)

    async def speak_slowly(self) -> str:
        """Send a body byte by byte: to the end of the server's patience, or leave before."""
        async with self.call() as (reader, writer):
            writer.write(_post(b"", "Content-Length: 10000"))
            status = asyncio.ensure_future(_status(reader))
            patience = self.draw.choice([2.0, 5.0, _ANSWER_S])
            for _ in range(int(2 * patience)):
                if not (await asyncio.wait([status], timeout=0.5))[1]:
                    break
                writer.write(b" ")
            if status.done():
                return status.result()
            status.cancel()
        return "left"

    async def say_nothing(self) -> str:
        """Hold connections open, some of them with half a head."""
        async with self.call() as (_, writer):
            writer.write(self.draw.choice([b"", b"GET /health", b"POST / HTTP/1.1\r\nHost: a"]))
            await asyncio.sleep(self.draw.uniform(5.0, 30.0))
        return "left"

    async def lose_the_way(self) -> str:
        """Ask for what is not there."""
        async with self.call() as (reader, writer):
            path = self.draw.choice(["/", "/v1", "/v1/models/none", "/%00", "/../../etc/passwd", f"/{'a' * 4000}"])
            writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            return await _status(reader)


class Kind(NamedTuple):
    """What a stranger does, how many do it at a time, and what may come of it."""

    act: Callable[[Stranger], Awaitable[str]]
    strangers: int
    outcomes: frozenset[str]


KINDS = {
    kind.act.__name__: kind
    for kind in (
        Kind(Stranger.vanish, 2, frozenset({"200"})),
        Kind(Stranger.leave_early, 1, frozenset({"left"})),
        Kind(Stranger.send_junk, 1, frozenset({"400", "closed"})),
        Kind(Stranger.send_too_much, 1, frozenset({"413"})),
        Kind(Stranger.ask_badly, 1, frozenset({"400"})),
        Kind(Stranger.speak_slowly, 2, frozenset({"408", "left"})),
        Kind(Stranger.say_nothing, 100, frozenset({"left"})),
        Kind(Stranger.lose_the_way, 1, frozenset({"200", "404"})),
    )
}
"""200 at a wrong path is the live page at `/`."""


def _post(body: bytes, length: str | None = None) -> bytes:
    head = f"POST {_CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return f"{head}{length or f'Content-Length: {len(body)}'}\r\n\r\n".encode() + body


async def _status(reader: asyncio.StreamReader) -> str:
    """Return the status of an answer, "closed" if the server hangs up without one, or "silent"."""
    try:
        async with asyncio.timeout(_ANSWER_S):
            line = await reader.readline()
    except TimeoutError:
        return "silent"
    except ConnectionError:
        return "closed"
    return line.split()[1].decode() if line.startswith(b"HTTP/1.1 ") else "closed"
