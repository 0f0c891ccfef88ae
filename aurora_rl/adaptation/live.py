"""Tokens per second of served requests, measured with arms in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from aurora_rl.envs import Completion, Request
from aurora_rl.serving.server import InferenceServer


class TimedRequests:
    """A source of requests that notes when each was taken and when it ended.

    Attributes:
        waiting: Requests to be taken, in order.
        ended: Tokens and seconds of each request that ended.
    """

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self.ended: list[tuple[int, float]] = []
        self._taken: dict[int, float] = {}

    def __call__(self) -> Request | None:
        """Return the next request; None where none waits."""
        if not self.waiting:
            return None
        request = self.waiting.pop(0)
        self._taken[request.id] = time.perf_counter()
        return request

    def completed(self, completion: Completion) -> str:
        """Note that a request ended."""
        seconds = time.perf_counter() - self._taken.pop(completion.request.id)
        self.ended.append((len(completion.tokens), seconds))
        return ""

    def refused(self, request: Request, reason: str) -> None:
        """Requests of a scenario are known to fit."""
        raise ValueError(reason)


def serve_sample(server: InferenceServer, source: TimedRequests, requests: Sequence[Request]) -> tuple[float, int]:
    """Serve requests to the last, and return the seconds that it took and the tokens delivered."""
    source.ended.clear()
    source.waiting[:] = requests
    began = time.perf_counter()
    while server.step():
        pass
    return time.perf_counter() - began, sum(tokens for tokens, _ in source.ended)


def measure_in_turns(
    servers: Mapping[str, tuple[InferenceServer, TimedRequests]],
    requests: Mapping[str, Sequence[Request]],
    turns: int,
    company: Callable[[str], AbstractContextManager[object]],
) -> Iterator[dict[str, Any]]:
    """Measure arms in turns on the same requests, so that a machine whose speed drifts treats them alike.

    The first turn of each is not measured: it takes up what the arm has to learn of the machine's pace. ``company`` is
    called with the name of an arm; what shares the machine with it runs in the block.

    Yields:
        Name of the arm, number of the turn, tokens of all requests, seconds from the first request to the last token,
        and output tokens per second of each request from when it was taken (OTPS), as JSON values.
    """
    names = list(servers)
    for turn in range(-1, turns):
        for place in range(len(names)):
            arm = names[(place + turn) % len(names)]
            server, source = servers[arm]
            with company(arm):
                seconds, tokens = serve_sample(server, source, requests[arm])
            if turn >= 0:
                paces = [round(count / spent, 3) for count, spent in source.ended]
                yield {"arm": arm, "turn": turn, "tokens": tokens, "seconds": round(seconds, 4), "per_second": paces}


def per_second_summary(values: Sequence[float]) -> dict[str, float]:
    """Return mean, median, 5th and 95th percentile of output tokens per second, as the paper's table has them.

    Example:
        >>> per_second_summary([1.0, 2.0, 3.0])
        {'mean': 2.0, 'p50': 2.0, 'p05': 1.1, 'p95': 2.9}
    """
    points = np.percentile(values, (50, 5, 95)).round(3).tolist()
    return {"mean": round(float(np.mean(values)), 3), **dict(zip(("p50", "p05", "p95"), points, strict=True))}
