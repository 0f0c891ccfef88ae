"""A learner's wire with up to a thousand engines, by simulation, with the costs that benchmarks/fleet.py measured.

Engines send trajectories as requests end (Poisson). Their sinks hold what the learner has not taken, and drop the
oldest beyond their bounds. The learner takes from its engines in turns. Heartbeats, trajectories and publications share
one core of the learner's host, as they share one Python process; its gradient steps have cores or a GPU of their own
and are not simulated. Incoming and outgoing traffic have a link each. A publication goes to all engines, and the next
begins once the last has ended.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scaling import MODELS, completion_bytes, drafter_parameters

from aurora_rl.collectors import engine_book, relay
from aurora_rl.collectors.codec import DEFAULT_LIMITS

ENGINES = (1, 4, 16, 64, 256, 1000)
TICK_S = 0.1
SINK = 256  # trajectories that a sink holds, and its bytes: the defaults of wire.queue and wire.queue_bytes
SINK_BYTES = 1 << 29
BUFFER_BYTES = 4 << 30  # the default of learner.buffer_bytes
CONNECTIONS = min(relay._MAX_CONNECTIONS, engine_book._MAX_ENGINES)


@dataclass(frozen=True)
class Costs:
    """What the learner's process pays, in CPU seconds and MiB.

    Attributes:
        trajectory: For a trajectory without its bytes.
        byte: For a byte of a trajectory: received, relayed, decoded and checked.
        engine: For a second of a connected engine that is silent.
        published_byte: For a byte of weights that is sent to one engine.
        base_mib: Memory without engines.
        engine_mib: Memory of an engine's two connections.
        swap: Seconds from the arrival of weights until an engine drafts with them.
    """

    trajectory: float
    byte: float
    engine: float
    published_byte: float
    base_mib: float
    engine_mib: float
    swap: float


@dataclass(frozen=True)
class Load:
    """What the fleet does.

    Attributes:
        name: What it is.
        tokens_per_second: Tokens that an engine delivers.
        tokens: Tokens of a completion.
        trajectory_bytes: Bytes of a captured request.
        captured: Share of the requests that are captured.
        weights_bytes: Bytes of the published weights.
        publish_every: Seconds between two publications.
        link: Bytes per second of the learner's link, in each direction.
    """

    name: str
    tokens_per_second: float
    tokens: int
    trajectory_bytes: float
    captured: float
    weights_bytes: float
    publish_every: float
    link: float


def costs_of(path: Path) -> Costs:
    """Return the costs that a result of benchmarks/fleet.py holds, by least squares over its numbers of engines."""
    result = json.loads(path.read_text())
    cells = [each for each in result["cells"] if each["kind"] == "replay"]
    count = np.array([each["engines"] for each in cells], dtype=float)

    def line(figures: list[float]) -> tuple[float, float]:
        """Slope, not below 0, and value at 0."""
        slope, start = np.polyfit(count, figures, 1)
        return max(float(slope), 0.0), float(start)

    engine, _ = line([each["idle"]["cpu_seconds_per_second"] for each in cells])
    engine_mib, base_mib = line([each["idle"]["rss_mib"] for each in cells])
    small = cells[-1]["flood"]
    large = result["large"]["flood"]
    byte = (large["cpu_ms_per_trajectory"] - small["cpu_ms_per_trajectory"]) / 1e3
    byte /= large["bytes_per_trajectory"] - small["bytes_per_trajectory"]
    publication, _ = line([each["publish"]["cpu_ms_per_publication"] / 1e3 for each in cells])
    return Costs(
        trajectory=small["cpu_ms_per_trajectory"] / 1e3 - byte * small["bytes_per_trajectory"],
        byte=byte,
        engine=engine,
        published_byte=publication / (cells[0]["publish"]["megabytes"] * 1e6),
        base_mib=base_mib,
        engine_mib=engine_mib,
        swap=cells[0]["paced"]["until_swapped"]["engine_ms"]["p50"] / 1e3,
    )


def simulate(engines: int, costs: Costs, load: Load, *, seconds: float = 600.0, seed: int = 0) -> dict[str, Any]:
    """Simulate so many engines on one learner, and return what became of their trajectories and of its weights."""
    dice, here = np.random.default_rng(seed), min(engines, CONNECTIONS)
    rate = load.tokens_per_second / load.tokens * load.captured
    room = int(max(min(SINK, SINK_BYTES // load.trajectory_bytes), 1))
    one_cpu = costs.trajectory + costs.byte * load.trajectory_bytes
    waiting = np.zeros(here, dtype=np.int64)
    recorded = taken = dropped = turn = 0
    cpu = link_in = busy = 0.0
    out_cpu = out_link = 0.0  # what the publication under way still needs
    began, next_publication, lasts = 0.0, load.publish_every, []
    ticks = int(seconds / TICK_S)
    for tick in range(ticks):
        now = tick * TICK_S
        arrived = dice.poisson(rate * TICK_S, engines)
        recorded, dropped = recorded + int(arrived.sum()), dropped + int(arrived[here:].sum())
        waiting += arrived[:here]
        dropped += int(np.maximum(waiting - room, 0).sum())
        waiting = np.minimum(waiting, room)
        share = max(TICK_S * (1 - costs.engine * here), 0.0)
        if not out_cpu and not out_link and now >= next_publication:
            began, next_publication = now, max(next_publication + load.publish_every, now)
            out_cpu = here * costs.published_byte * load.weights_bytes
            out_link = here * load.weights_bytes
        used = 0.0
        if out_cpu or out_link:
            used = min(out_cpu, share / 2 if waiting.any() else share)
            out_cpu, out_link = out_cpu - used, max(out_link - load.link * TICK_S, 0.0)
            if not out_cpu and not out_link:
                lasts.append(now + TICK_S - began + costs.swap)
        # Credit that is not needed is lost, but for what a trajectory takes that has begun.
        cpu = min(cpu + share - used, one_cpu + share)
        link_in = min(link_in + load.link * TICK_S, load.trajectory_bytes + load.link * TICK_S)
        can = int(min(cpu / one_cpu, link_in / load.trajectory_bytes, waiting.sum()))
        cpu, link_in, taken = cpu - can * one_cpu, link_in - can * load.trajectory_bytes, taken + can
        busy += used + can * one_cpu + TICK_S - share
        while can:
            order = np.roll(np.flatnonzero(waiting), -turn)[:can]
            waiting[order] -= 1
            can, turn = can - len(order), turn + len(order)
    unread = min(int(waiting.sum()) * load.trajectory_bytes, DEFAULT_LIMITS.max_bytes)
    return {
        "engines": engines,
        "refused": engines - here,
        "cores": round(busy / seconds, 3),
        "link_in": round(taken * load.trajectory_bytes / seconds / load.link, 4),
        "taken_per_second": round(taken / seconds, 1),
        "dropped": round(dropped / recorded, 4) if recorded else 0.0,
        "last_swap_s": {"p50": round(float(np.median(lasts)), 2), "max": round(max(lasts), 2)} if lasts else None,
        "memory_gib": round((costs.base_mib + costs.engine_mib * here) / 1024 + (BUFFER_BYTES + unread) / 2**30, 2),
    }


def broken(figures: dict[str, Any], load: Load) -> list[str]:
    """What does not hold any more."""
    swap = figures["last_swap_s"]
    return [
        what
        for what, is_so in {
            "engines are refused": figures["refused"] > 0,
            "over 1% of the trajectories are dropped": figures["dropped"] > 0.01,
            "weights take longer to the last engine than until the next ones": swap is None
            or swap["p50"] > load.publish_every,
        }.items()
        if is_so
    ]


def studied(costs: Costs, load: Load, seconds: float = 600.0) -> dict[str, Any]:
    """Return the figures of some numbers of engines, and the least number at which each thing breaks.

    None is more than the largest number. Between two numbers the least is found by halving.
    """
    known: dict[int, dict[str, Any]] = {}

    def figures(engines: int) -> dict[str, Any]:
        if engines not in known:
            known[engines] = simulate(engines, costs, load, seconds=seconds)
        return known[engines]

    breaks_at: dict[str, int | None] = {}
    for what in broken({"refused": 1, "dropped": 1.0, "last_swap_s": None}, load):
        high = next((count for count in ENGINES if what in broken(figures(count), load)), None)
        low = max((count for count in ENGINES if high is not None and count < high), default=0)
        while high is not None and high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if what in broken(figures(middle), load) else (middle, high)
        breaks_at[what] = high
    return {"breaks_at": breaks_at, "figures": [figures(count) for count in ENGINES]}


def loads() -> list[Load]:
    """The loads of docs/scaling.md: a tiny model, and targets of 70B and 229B with all or a share captured."""
    gigabytes = 25e9 / 8  # a link of 25 Gbit/s
    tiny = Load("tiny", 1000.0, 24, 6e3, 1.0, 6e4, 10.0, gigabytes)
    found = [tiny]
    for model in MODELS:
        size, weights = completion_bytes(model), 2.0 * drafter_parameters(model)
        full = Load(f"{model.name}, all captured", 1000.0, 512, size, 1.0, weights, 300.0, gigabytes)
        found += [full, replace(full, name=f"{model.name}, 2% captured", captured=0.02)]
    return found


def simulated(costs: Costs) -> dict[str, Any]:
    """Figures of all loads by number of engines, and what breaks first in each."""
    studies = [{**asdict(load), **studied(costs, load)} for load in loads()]
    return {"costs": asdict(costs), "connections": CONNECTIONS, "loads": studies}
