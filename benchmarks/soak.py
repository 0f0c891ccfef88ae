"""Soak: minutes of clients that vanish, send junk or never finish, next to clients whose answers must stay the same.

`aurora-rl serve` runs as a child, in float32, where a text hardly ever depends on what else is in the batch. Its
memory, descriptors, threads and requests are noted every ten seconds. The exit status is 1 if memory grew, descriptors
or slots were not given back, a well-behaved client got another answer than at the start, or a stranger another than it
should.

python benchmarks/soak.py --minutes 20
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
from common import arguments, parse, prompts, write_result
from http_load import Load
from http_servers import Server, aurora, free_port, started
from strangers import KINDS, MAX_BODY, Kind, Stranger

from aurora_rl.workload.traffic import generate_traffic

GROWTH_MIB = 32.0  # that memory may grow by, fitted over the last three quarters
DESCRIPTORS = 2  # that may be open more than at the start
_TALK = 500  # chats that strangers begin
_PAUSE_S = 0.2  # on average, between two acts of a stranger
_SETTLE_S = 60.0
_PAIRS = [
    *("learner.spawn=false", "dtype=float32"),
    *(f"http.max_body={MAX_BODY}", "http.timeout=60"),
    # Full within the first quarter, and dropping the oldest from then on.
    *("engine.prefix_cache_tokens=2048", "wire.queue=32", "drafter.history=4096"),
]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2", help="folder or hub id of the target")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--clients", type=int, default=2, help="well-behaved clients; every other one decodes plainly")
    parser.add_argument("overrides", nargs="*", help="key=value pairs for the server")
    options = parse(parser)
    figures = run(options)
    write_result(__file__, options, figures)
    sys.exit(bool(figures["failures"]))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Soak a server; return what was counted, and what is wrong in it."""
    with TemporaryDirectory() as folder:
        port, log = free_port(), Path(folder) / "serve.log"
        with started(aurora(options, Path(folder), port, *_PAIRS), port, log) as server:
            figures = asyncio.run(soak(options, server))
            status = server.end()
        told = log.read_text(errors="replace")
    failures = failures_of(figures)
    if status:
        failures.append(f"the server ended with status {status}")
    if "Traceback" in told:
        failures.append(f"a traceback in the server's log: {told[told.index('Traceback') :][:2000]}")
    return {"settings": _PAIRS, **figures, "failures": failures}


async def soak(options: argparse.Namespace, server: Server) -> dict[str, Any]:
    """Return what was counted."""
    asked = prompts(options)
    talk = [prompt.messages for prompt in generate_traffic(_TALK, seed=1)]
    load = Load(server.url, options.max_new_tokens)
    plain = Load(server.url, options.max_new_tokens, {"X-Aurora-Speculative": "false"})
    first = [(await load.closed_loop([prompt], 1))[0] for prompt in asked]
    assert all(answer.complete for answer in first)
    expected = [answer.text for answer in first]
    answers: Counter[str] = Counter()
    acts: dict[str, Counter[str]] = defaultdict(Counter)
    began, seconds = time.monotonic(), options.minutes * 60
    before = await asyncio.to_thread(sample, server, began)

    async def well_behaved(client: int) -> None:
        way = plain if client % 2 else load
        for number in itertools.count(client):
            if time.monotonic() > began + seconds:
                return
            (answer,) = await way.closed_loop([asked[number % len(asked)]], 1)
            equal = answer.text == expected[number % len(asked)]
            answers["failed" if not answer.complete else "equal" if equal else "different"] += 1

    async def misbehave(name: str, kind: Kind, seed: str) -> None:
        stranger = Stranger(httpx.URL(server.url).port or 0, talk, random.Random(seed))
        while True:
            acts[name][await kind.act(stranger)] += 1
            await asyncio.sleep(stranger.draw.expovariate(1 / _PAUSE_S))

    strangers = [
        asyncio.create_task(misbehave(name, kind, f"{name} {number}"))
        for name, kind in KINDS.items()
        for number in range(kind.strangers)
    ]
    clients = [asyncio.create_task(well_behaved(client)) for client in range(options.clients)]
    samples = [before]
    while time.monotonic() < began + seconds:
        await asyncio.sleep(min(10.0, seconds / 20))
        samples.append(await asyncio.to_thread(sample, server, began))
        print(samples[-1], dict(answers), flush=True)
    await asyncio.gather(*clients)
    for task in strangers:
        task.cancel()
    ended = await asyncio.gather(*strangers, return_exceptions=True)
    after = await settled(server, began, before)
    return {
        "minutes": options.minutes,
        "slots": options.slots,
        "clients": options.clients,
        "tolerance": {"growth_mib": GROWTH_MIB, "descriptors": DESCRIPTORS},
        "answers": dict(answers),
        "strangers": {name: dict(acts[name]) for name in KINDS},
        "strangers_that_broke": [repr(e) for e in ended if not isinstance(e, asyncio.CancelledError)],
        "growth_mib": growth(samples),
        "before": before,
        "after": after,
        "samples": samples[:: max(len(samples) // 20, 1)],
    }


def sample(server: Server, began: float) -> dict[str, float]:
    """Return what the server's process holds and how many requests it has."""
    process = Path(f"/proc/{server.process.pid}")
    info = httpx.get(f"{server.url}/server_info", timeout=60.0).json()
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "seconds": round(time.monotonic() - began, 1),
        "rss_mib": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "descriptors": len(list((process / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "running": info["num_running"],
        "waiting": info["num_waiting"],
    }


async def settled(server: Server, began: float, before: Mapping[str, float]) -> dict[str, float]:
    """Return the last sample: as soon as nothing is held any more, or after a minute."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        last = await asyncio.to_thread(sample, server, began)
        idle = not last["running"] and not last["waiting"] and last["descriptors"] <= before["descriptors"]
        if idle or time.monotonic() > deadline:
            return last
        await asyncio.sleep(1.0)


def growth(samples: Sequence[Mapping[str, float]]) -> float:
    """Return the MiB by which memory grew after the first quarter, by a straight line through it."""
    since = samples[-1]["seconds"] / 4
    seconds, rss = zip(*((s["seconds"], s["rss_mib"]) for s in samples if s["seconds"] >= since), strict=True)
    return float(np.polyfit(seconds, rss, 1)[0] * (seconds[-1] - seconds[0]))


def failures_of(figures: Mapping[str, Any]) -> list[str]:
    """Return what leaked or was answered wrongly, a line each."""
    before, after, answers = figures["before"], figures["after"], figures["answers"]
    found = [f"{answers[kind]} answers {kind}" for kind in ("different", "failed") if answers.get(kind)]
    if not answers.get("equal"):
        found.append("no answer was compared")
    if figures["growth_mib"] > GROWTH_MIB:
        found.append(f"memory grew by {figures['growth_mib']:.0f} MiB, more than {GROWTH_MIB:g}")
    if after["descriptors"] > before["descriptors"] + DESCRIPTORS:
        found.append(f"{after['descriptors']} descriptors are open, and {before['descriptors']} were")
    found += [f"{after[kind]} requests are {kind}" for kind in ("running", "waiting") if after[kind]]
    for name, outcomes in figures["strangers"].items():
        wrong = {outcome: count for outcome, count in outcomes.items() if outcome not in KINDS[name].outcomes}
        found += [f"{name}: {count} times {outcome}" for outcome, count in wrong.items()]
    return found + [f"a stranger broke: {error}" for error in figures["strangers_that_broke"]]


if __name__ == "__main__":
    main()
