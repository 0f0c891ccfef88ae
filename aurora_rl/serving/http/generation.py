"""The choices of one answer, generated side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from aurora_rl.envs import Completion
from aurora_rl.serving.async_engine import AsyncEngine, Job
from aurora_rl.serving.http.errors import ClientGoneError

T = TypeVar("T")


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
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
