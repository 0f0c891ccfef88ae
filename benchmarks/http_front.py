"""What the HTTP front costs: the same engine, in turns driven by a queue of requests and by clients over HTTP.

The engine runs in a process of its own, as under `aurora-rl serve`: rounds in the main thread, HTTP in another. The
cost of throughput has two parts: HTTP work that delays rounds, which shows in the pace of rounds with all slots
occupied, and slots that stay empty until their client asks again, which shows in how many are occupied.

The beginning of a turn is neither. The queue has all requests at once, and their prompts are read together;
clients' come one after the other, and all but the first are read in chunks along with its rounds. So there is a third
figure, "busy": tokens per second between the first and the last ends of requests in a turn, as many as there are slots.

On a machine whose pace changes neither part is seen. There the CPU time of the other threads bounds the first: a round
cannot wait for more of it. It is given by thread as a share of the CPU time of the thread that serves the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import cost
from http_load import Load
from http_servers import settings
from typing_extensions import override

from aurora_rl.cli.assembly import first_drafter, load, request_queue
from aurora_rl.cli.config import load_config
from aurora_rl.cli.embedded import embedded_server
from aurora_rl.cli.http import HttpFront
from aurora_rl.cli.spec import resolve
from aurora_rl.envs import Completion, Request
from aurora_rl.serving.async_engine import AsyncEngine
from aurora_rl.serving.requests import RequestQueue
from aurora_rl.telemetry.history import RunHistory
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.rates import Round, Rounds
from aurora_rl.workload.traffic import Prompt

_IDLE_S = 0.1  # as `aurora-rl serve` waits
_GOAL = 0.03
_ROUNDS = "rounds"  # asks for the rounds since it was asked last
End = tuple[float, int]  # when a request ended, and the tokens that had been delivered by then, to all requests
_PAIRS = ["baseline.share=0", "engine.prefix_cache_tokens=0", "drafter.history=0"]


class Workload:
    """Requests of a queue, of which so many run at a time as there would be clients."""

    def __init__(self) -> None:
        self._queue: RequestQueue | None = None
        self._most = self._running = self.tokens = 0

    def begin(self, queue: RequestQueue, clients: int) -> None:
        self._queue, self._most, self.tokens = queue, clients, 0

    def __call__(self) -> Request | None:
        if self._queue is None or self._running == self._most or (request := self._queue()) is None:
            return None
        self._running += 1
        return request

    def completed(self, completion: Completion) -> str:
        assert self._queue is not None
        self._running -= 1
        self.tokens += len(completion.tokens)
        return self._queue.completed(completion)

    def refused(self, request: Request, reason: str) -> None:
        raise RuntimeError(f"request {request.id} is refused: {reason}")


class Watched(AsyncEngine):
    """Requests of clients and of a workload, and when each ended."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.ends: list[End] = []

    @override
    def completed(self, completion: Completion) -> str:
        self.ends.append((time.perf_counter(), self.delivered))
        return super().completed(completion)


def host(pipe: Connection, pairs: Sequence[str], prompts: Sequence[Prompt], folder: Path) -> None:
    """Serve over HTTP, and prompts by the queue when the pipe names a number of clients; None ends it."""
    config = load_config(overrides=pairs)
    torch.set_num_threads(config.engine.threads)
    spec, http = resolve(config), HttpFront(config)
    target = load(spec)

    queue = partial(request_queue, spec, target, prompts)
    first = queue()
    usual = first.first_prompts(1)[0]
    drafter, _ = first_drafter(spec, target, first.first_prompts(64), None)
    workload, cpu_before = Workload(), cpu_by_thread()
    clients = Watched(max_waiting=config.http.max_waiting, workload=workload, first_id=first.total)
    server = embedded_server(spec, target, clients, usual, drafter, MetricsLog(folder / "metrics.jsonl", "server"))
    clients.attach(server)
    http.start(spec, target.tokenizer, target.parts.config.vocab_size, clients, server, RunHistory())
    pipe.send(http.url)
    try:
        while True:
            if pipe.poll():
                if (number := pipe.recv()) is None:
                    break
                if number == _ROUNDS:
                    pace, occupied = pace_and_occupancy(server.stats.rounds, config.engine.slots)
                    cpu = cpu_by_thread()
                    spent = {name: s - cpu_before.get(name, 0.0) for name, s in cpu.items()}
                    pipe.send((busy(clients.ends, config.engine.slots), pace, occupied, spent))
                    server.stats.rounds, cpu_before, clients.ends = Rounds(), cpu, []
                    continue
                workload.begin(queue(), number)
                began = time.perf_counter()
                while clients.step():
                    pass
                pipe.send((workload.tokens, time.perf_counter() - began))
            elif not clients.step():
                clients.wait(_IDLE_S)
    finally:
        clients.end()
        http.stop()
        server.close()


def cpu_by_thread() -> Counter[str]:
    """Return the CPU seconds of this process's threads, by name; numbers at the end of names are left out.

    >>> cpu_by_thread()["MainThread"] > 0
    True
    """
    seconds = Counter[str]()
    for thread in threading.enumerate():
        clock = time.pthread_getcpuclockid(thread.ident or 0)
        seconds[thread.name.rstrip("0123456789_")] += time.clock_gettime(clock)
    return seconds


def busy(ends: Sequence[End], slots: int) -> float:
    """Return tokens per second without what came before the first ``slots`` ends and after all but as many; or nan.

    >>> busy([(4.0, 8), (5.0, 10), (6.0, 14), (10.0, 20)], slots=1)
    3.0
    """
    if len(ends) <= 2 * slots:
        return math.nan
    (began, before), (ended, after) = ends[slots - 1], ends[-slots - 1]
    return (after - before) / (ended - began)


def pace_and_occupancy(rounds: Iterable[Round], slots: int) -> tuple[float, float]:
    """Return tokens per second of rounds with all slots occupied, and the mean share of slots that were; nan of none.

    >>> pace_and_occupancy([Round(True, 2, 6, 2.0, 0), Round(True, 1, 1, 2.0, 0)], slots=2)
    (3.0, 0.75)
    """
    found = list(rounds)
    full = [each for each in found if each.occupied == slots]
    if not full:
        return math.nan, math.nan
    share = sum(each.occupied * each.seconds for each in found) / sum(each.seconds for each in found) / slots
    return sum(each.tokens for each in full) / sum(each.seconds for each in full), share


def measure(options: argparse.Namespace, prompts: Sequence[Prompt], folder: Path) -> dict[str, Any]:
    """Return what the front leaves of the engine's throughput, at each number of clients.

    Answers have from half to one and a half of `--max-new-tokens`: slots whose answers all end in one round are filled
    together by the queue, and by clients one after another, which would be measured as the front's.
    """
    most = options.max_new_tokens
    prompts = [replace(p, max_tokens=most // 2 + 1 + index * 7 % most) for index, p in enumerate(prompts)]
    pairs = [
        *settings(options, folder),
        "http.port=0",
        # Neither plain windows, which fall anywhere, nor what an earlier turn has read or answered.
        *_PAIRS,
        *options.overrides,
    ]
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as `aurora-rl` sets it, before torch is loaded
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=host, args=(end, pairs, prompts, folder), daemon=True)
    process.start()
    end.close()
    load = Load(pipe.recv(), options.max_new_tokens)

    def by_queue(clients: int) -> tuple[int, float]:
        pipe.send(clients)
        return pipe.recv()

    def over_http(clients: int) -> tuple[int, float]:
        answers = asyncio.run(load.closed_loop(prompts, clients))
        assert all(answer.complete and answer.usage for answer in answers)
        seconds = max(answer.ended for answer in answers) - min(answer.began for answer in answers)
        return sum(answer.usage["completion_tokens"] for answer in answers if answer.usage), seconds

    def ask_rounds() -> tuple[float, float, float, Counter[str]]:
        pipe.send(_ROUNDS)
        return pipe.recv()

    figures = {}
    for clients in options.front_clients:
        over_http(clients), by_queue(clients)  # unmeasured
        found = {figure: {"queue": [], "http": []} for figure in ("throughput", "busy", "pace", "occupied")}
        spent = {"queue": Counter[str](), "http": Counter[str]()}
        for turn in range(options.turns):
            ways = [("queue", by_queue), ("http", over_http)]
            for name, way in ways if turn % 2 else reversed(ways):
                ask_rounds()
                tokens, seconds = way(clients)
                *rounds, cpu = ask_rounds()
                for each, value in zip(found.values(), (tokens / seconds, *rounds), strict=True):
                    each[name].append(value)
                spent[name].update(cpu)
            ratios = [f"{each['http'][-1] / each['queue'][-1]:.3f}" for each in found.values()]
            print(
                f"front, {clients} clients, turn {turn + 1}: throughput, busy, pace, occupancy {', '.join(ratios)}; "
                f"CPU of threads so far {shares(spent['http'])}",
                flush=True,
            )
        figures[clients] = compare(**found["throughput"]) | {
            "busy": compare(**found["busy"]),
            "of_a_full_round": compare(**found["pace"]),
            "occupied": {name: round(statistics.fmean(each), 4) for name, each in found["occupied"].items()},
            "cpu_of_threads": {name: shares(seconds) for name, seconds in spent.items()},
        }
    pipe.send(None)
    process.join(60)
    return {"settings": _PAIRS, "goal": _GOAL, "clients": figures}


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the CPU time of each thread as a share of the main thread's, which serves the rounds.

    >>> shares({"MainThread": 4.0, "http": 0.1})
    {'http': 0.025}
    """
    return {name: round(each / seconds["MainThread"], 4) for name, each in seconds.items() if name != "MainThread"}


def compare(queue: Sequence[float], http: Sequence[float]) -> dict[str, Any]:
    """Return the cost of HTTP as a share of throughput: the median of the turns and its interval."""
    found = cost(queue, http, _GOAL)
    return {
        "tokens_per_second": {"queue": round(statistics.median(queue), 2), "http": round(statistics.median(http), 2)},
        "cost": found["cost"],
        "cost_interval_95": found["interval_95"],
        "within_goal": found["within_goal"],
        "turns": found["pairs"],
    }
