"""Engines on one learner over loopback: what it takes in, its memory, and how long new weights are on their way.

Every engine and the learner is a process of its own. A "replay" engine has both ends of the wire and a drafter: it
sends recorded trajectories of a tiny model again and again, and installs what the learner publishes. A "decode" engine
is `InferenceServer` on the tiny model. The learner is the library's, with its gate. A cell has four phases:

    idle     engines are connected and silent: what a connection costs in CPU time and memory
    flood    they send as fast as they can; the learner takes and checks, and does not learn
    paced    each sends --rate trajectories a second; the learner learns, and publishes what its gate passes
    publish  weights of --weights-mb are published --publications times (to replay engines, which keep them)

One more engine floods the learner with trajectories of --hidden, so that the cost of a byte is known too. CPU time is
the learner process's, its threads included. --simulate takes these costs from an earlier result and goes on to
thousands of engines (benchmarks/fleet_simulation.py).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_result
from fleet_simulation import costs_of, simulated
from scaling import LAYERS, MODELS, recorded

from aurora_rl import Request, SamplingParams
from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.weights import WeightPublisher, WeightReceiver
from aurora_rl.objectives import ImitationLoss
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.serving.server import InferenceServer
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.telemetry.outputs import Outputs
from aurora_rl.telemetry.rates import BaselineWindows
from aurora_rl.testing import serve, tiny_target
from aurora_rl.training.gate import Gate
from aurora_rl.training.learner import Learner
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.replay import trajectory_buffer
from aurora_rl.trajectories import size_of, validate

LOCAL = "tcp://127.0.0.1:*"
SHAPE = TreeShape(3)
TINY, VOCAB = 16, 32  # hidden size and vocabulary of the tiny model
QUEUED = 64  # trajectories that an engine in a flood keeps waiting
START_S = 300.0
# Forked from a server that has imported these: on its own each process would import torch anew, for seconds.
FORKED = multiprocessing.get_context("forkserver")
PRELOADED = ["aurora_rl.training.learner", "aurora_rl.serving.server", "aurora_rl.testing", "aurora_rl.objectives"]
PRELOADED += ["transformers.models.llama.modeling_llama"]
Start = Callable[..., None]


def parts_and_drafter() -> tuple[TargetParts, Eagle3Drafter]:
    parts = TargetParts.of(tiny_target(dtype=torch.float32, seed=1))
    torch.manual_seed(0)
    return parts, Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(VOCAB))


def prompts(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (4,), generator=generator) for _ in range(count)]


# ---- engines ---------------------------------------------------------------------------------------------------------


class ReplayEngine:
    """Sends recorded trajectories, and installs the weights that come."""

    def __init__(self, number: int, wire: dict[str, Any], hidden: int) -> None:
        _, drafter = parts_and_drafter()
        self._drafter, ends = drafter.serving_copy(torch.float32), {"handshake": wire["handshake"]}
        self._recorded = (
            serve(self._drafter, tiny_target(dtype=torch.float32, seed=1), prompts(8, number), shape=SHAPE, num_slots=8)
            if hidden == TINY
            else [recorded(replace(MODELS[0], hidden=hidden, vocab=VOCAB), "hidden", 512, 256).contiguous()]
        )
        name = f"engine-{number}"
        self.sink = TrajectorySink(wire["trajectories"], name=name, max_bytes=1 << 30, **ends)
        self._receiver = WeightReceiver(wire["weights"], name=name, **ends)
        self._sent, self.swaps = 0, list[tuple[int, float]]()

    def turn(self, due: int) -> None:
        """Send so many trajectories, and install the newest weights if there are any."""
        for _ in range(due):
            self.sink.extend(self._recorded[self._sent % len(self._recorded)], seconds=0.1)
            self._sent += 1
        if (latest := self._receiver.latest()) is not None:
            version, weights = latest
            flat = dict(weights.flatten_keys(".").items())
            began = time.perf_counter()
            if "bulk" not in flat:
                self._drafter.install(flat)
                flat = self._drafter.published()
            self.swaps.append((version, time.monotonic()))
            self._receiver.acknowledge(version, checksum(flat), 1e3 * (time.perf_counter() - began))

    def close(self) -> None:
        self.sink.close(0.1)
        self._receiver.close(0.1)


class DecodeEngine:
    """Decodes requests of the tiny model, as a server does."""

    def __init__(self, number: int, wire: dict[str, Any], folder: str) -> None:
        _, drafter = parts_and_drafter()
        name, ends = f"engine-{number}", {"handshake": wire["handshake"]}
        self.sink = TrajectorySink(wire["trajectories"], name=name, **ends)
        receiver = WeightReceiver(wire["weights"], name=name, **ends)
        target = tiny_target(dtype=torch.float32, seed=1)
        decoder = SpeculativeDecoder(target, drafter, self._next, shape=SHAPE, max_length=64, num_slots=4)
        assert decoder.policy is not None
        self._policy = decoder.policy
        log = MetricsLog(f"{folder}/{name}.jsonl", "serve")
        self._server = InferenceServer(
            decoder.env, self._policy, windows=BaselineWindows(0.0, 32), log=log, sink=self.sink, receiver=receiver
        )
        self._prompts, self._asked, self._due = prompts(64, number), 0, 0
        self.swaps: list[tuple[int, float]] = []

    def _next(self) -> Request | None:
        if not self._due:
            return None
        self._due, number = self._due - 1, self._asked
        self._asked += 1
        return Request(number, self._prompts[number % 64], SamplingParams(max_tokens=12))

    def turn(self, due: int) -> None:
        """Let so many more requests in, and decode a round."""
        self._due = min(self._due + due, QUEUED)
        before = self._policy.version
        self._server.step()
        if self._policy.version != before:
            self.swaps.append((self._policy.version, time.monotonic()))

    def close(self) -> None:
        self._server.close()


def engine(kind: str, number: int, wire: dict[str, Any], hidden: int, folder: str, orders: Connection) -> None:
    """Run an engine at the rates that are ordered, in trajectories per second; None ends it."""
    torch.set_num_threads(1)
    built = ReplayEngine(number, wire, hidden) if kind == "replay" else DecodeEngine(number, wire, folder)
    dice, rate, next_due = random.Random(number), 0.0, 0.0
    orders.send("ready")
    while rate is not None:
        now, due = time.monotonic(), 0
        if math.isinf(rate):
            due = max(QUEUED - built.sink.queued, 0)
        elif rate:
            while next_due <= now:
                next_due, due = next_due + dice.expovariate(rate), due + 1
        built.turn(due)
        time.sleep(5e-4)
        if orders.poll():
            rate, next_due = orders.recv(), time.monotonic()
    built.close()
    orders.send({"swaps": built.swaps, "drops": dict(+built.sink.drops)})


# ---- the learner -----------------------------------------------------------------------------------------------------


class LearnerEnd:
    """The learner of the fleet; each method is a phase, and returns its figures."""

    def __init__(self, hidden: int, folder: str) -> None:
        parts, drafter = parts_and_drafter()
        handshake = Handshake.of(parts, drafter, "eagle3")
        layers = len(drafter.feature_layers) if hidden == TINY else LAYERS
        check = partial(validate, vocab_size=VOCAB, feature_size=layers * hidden)
        self._collector = ZMQCollector(LOCAL, handshake=handshake, validate=partial(check, hidden_size=hidden))
        self._publisher = WeightPublisher(LOCAL, handshake=handshake)
        self.wire = {
            "trajectories": self._collector.address,
            "weights": self._publisher.address,
            "handshake": handshake,
        }
        self._published: dict[int, float] = {}
        publish = self._publisher.publish

        def timed(version: int, *arguments: Any) -> str:
            self._published[version] = time.monotonic()
            return publish(version, *arguments)

        self._publisher.publish = timed  # type: ignore[method-assign]
        log = MetricsLog(f"{folder}/metrics.jsonl", "learner")
        self._reader = MetricsReader(log.path)
        self._learner = Learner(
            drafter=drafter,
            loss=ImitationLoss(drafter, parts.head, steps=3),
            optimizers=drafter_optimizers(drafter, muon_lr=0.02, adam_lr=1e-3),
            buffer=trajectory_buffer(2000, 4),
            collector=self._collector,
            publisher=self._publisher,
            gate=Gate(8, 10.0, SHAPE, drafter.serving_copy(torch.float32)),
            log=log,
            serving_dtype=torch.float32,
            batch_size=4,
            replay=10,
            publish_every=8,
            max_skipped=20,
            states=Path(folder) / "learner",
            outputs=Outputs(log),
        )

    def connected(self, engines: int) -> None:
        """Wait until all engines have introduced themselves."""
        deadline = time.monotonic() + START_S
        while len(self._publisher.engines) < engines:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self._publisher.engines)} of {engines} engines are there")
            time.sleep(0.05)

    def idle(self, seconds: float) -> dict[str, Any]:
        time.sleep(0.5)
        cpu = time.process_time()
        time.sleep(seconds)
        return {"cpu_seconds_per_second": round((time.process_time() - cpu) / seconds, 5), "rss_mib": memory("VmRSS")}

    def flood(self, seconds: float) -> dict[str, Any]:
        by_engine: Counter[str] = Counter()
        taken, bytes_taken = 0, 0
        if not self._collector.poll(START_S):
            raise TimeoutError(f"no trajectory has arrived; dropped: {dict(self._collector.rejections)}")
        began, cpu = time.monotonic(), time.process_time()
        while time.monotonic() < began + seconds:
            for trajectory in self._collector.poll(0.1):
                taken, bytes_taken = taken + 1, bytes_taken + size_of(trajectory)
                by_engine[trajectory.get_non_tensor("source")] += 1
        took, cpu = time.monotonic() - began, time.process_time() - cpu
        return {
            "trajectories_per_second": round(taken / took, 1),
            "megabytes_per_second": round(bytes_taken / took / 1e6, 2),
            "bytes_per_trajectory": round(bytes_taken / taken),
            "cpu_ms_per_trajectory": round(1e3 * cpu / taken, 4),
            "cores": round(cpu / took, 3),
            "shares": spread([number / taken for number in by_engine.values()]),
            "rss_mib": memory("VmRSS"),
        }

    def drain(self) -> None:
        """Take what is still on its way."""
        while self._collector.poll(0.5):
            pass

    def paced(self, seconds: float) -> dict[str, Any]:
        learner, self._published = self._learner, {}
        began, cpu = time.monotonic(), time.process_time()
        while time.monotonic() < began + seconds:
            learner.step(wait_s=0.02)
        took, cpu = time.monotonic() - began, time.process_time() - cpu
        drops = sum((Counter(each["reasons"]) for each in self._reader if each["event"] == "drops"), Counter[str]())
        return {
            "learned_per_second": round(learner.seen / took, 1),
            "steps": learner.steps,
            "cores": round(cpu / took, 3),
            "dropped_by_the_learner": dict(drops),
            "rss_mib": memory("VmRSS"),
            "peak_rss_mib": memory("VmHWM"),
            "published": self._published,
        }

    def publish(self, engines: int, count: int, megabytes: float) -> dict[str, Any]:
        """Publish large weights, each once the last ones are loaded everywhere."""
        weights, self._published, costs = torch.zeros(int(megabytes * 1e6 / 4)), {}, []
        for number in range(count):
            weights[0], cpu = float(number), time.process_time()
            version = self._publisher.next_version
            self._publisher.publish(version, {"bulk": weights})
            if not self._publisher.wait_ack(version, 60.0, engines=engines):
                raise TimeoutError(f"version {version} did not reach {engines} engines within a minute")
            costs.append(time.process_time() - cpu)
        return {
            "megabytes": megabytes,
            "cpu_ms_per_publication": round(1e3 * statistics.median(costs), 2),
            "rss_mib": memory("VmRSS"),
            "published": self._published,
        }

    def close(self) -> None:
        self._learner.close()


def learner(hidden: int, folder: str, orders: Connection) -> None:
    """Run the phases that are ordered, each a name and its arguments; None ends it."""
    torch.set_num_threads(1)
    built = LearnerEnd(hidden, folder)
    orders.send(built.wire)
    while (order := orders.recv()) is not None:
        name, *arguments = order
        orders.send(getattr(built, name)(*arguments))
    built.close()
    orders.send("closed")


def memory(figure: str) -> float:
    """A figure of this process in MiB: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith(f"{figure}:")) / 1024, 1)


# ---- cells -----------------------------------------------------------------------------------------------------------


def spread(values: Iterable[float], digits: int = 4) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "least": round(ordered[0], digits),
        "p50": round(statistics.median(ordered), digits),
        "most": round(ordered[-1], digits),
    }


def swap_times(published: dict[int, float], engines: list[list[tuple[int, float]]]) -> dict[str, Any] | None:
    """Milliseconds from publication until each engine drafts with that version or a newer one, and until the last does.

    A version that some engine had not loaded at the end is left out, and counted.
    """
    each, last, unseen = [], [], 0
    for version, began in published.items():
        loaded = [min((at for number, at in swaps if number >= version), default=None) for swaps in engines]
        times = [1e3 * (at - began) for at in loaded if at is not None]
        if len(times) < len(engines):
            unseen += 1
            continue
        each += times
        last.append(max(times))
    if not last:
        return None
    return {
        "publications": len(last),
        "not_loaded_at_the_end": unseen,
        "engine_ms": {"p50": round(statistics.median(each), 1), "max": round(max(each), 1)},
        "last_engine_ms": {"p50": round(statistics.median(last), 1), "max": round(max(last), 1)},
    }


def in_process(target: Callable[..., None], *arguments: Any) -> None:
    FORKED.Process(target=target, args=arguments, daemon=True).start()


def answer(connection: Connection, timeout: float = START_S) -> Any:
    if not connection.poll(timeout):
        raise TimeoutError(f"a process has not answered for {timeout} s")
    return connection.recv()


def cell(options: argparse.Namespace, kind: str, count: int, hidden: int = TINY, start: Start = in_process) -> dict:
    """Measure a learner with so many engines."""
    with tempfile.TemporaryDirectory() as folder:
        orders, far = multiprocessing.Pipe()
        start(learner, hidden, folder, far)
        wire = answer(orders)
        pipes = [multiprocessing.Pipe() for _ in range(count)]
        for number, (_, engine_end) in enumerate(pipes):
            start(engine, kind, number, wire, hidden, folder, engine_end)
        engines = [near for near, _ in pipes]
        for each in engines:
            answer(each)

        def phase(name: str, *arguments: Any, rate: float = 0.0) -> Any:
            for each in engines:
                each.send(rate)
            orders.send((name, *arguments))
            print(f"{kind} {count}: {name}", file=sys.stderr, flush=True)
            return answer(orders)

        phase("connected", count)
        found = {"engines": count, "kind": kind, "idle": phase("idle", options.idle_seconds)}
        found["flood"] = phase("flood", options.flood_seconds, rate=math.inf)
        phase("drain")
        if hidden == TINY:
            found["paced"] = phase("paced", options.paced_seconds, rate=options.rate)
            phase("drain")
            if kind == "replay":
                found["publish"] = phase("publish", count, options.publications, options.weights_mb)
        for each in engines:
            each.send(None)
        ended = [answer(each) for each in engines]
        orders.send(None)
        answer(orders)
    for name in ("paced", "publish"):
        if name in found:
            swaps = [each["swaps"] for each in ended]
            found[name]["until_swapped"] = swap_times(found[name].pop("published"), swaps)
    found["dropped_by_engines"] = {f"engine-{i}": each["drops"] for i, each in enumerate(ended) if each["drops"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="1,2,4,8", help="numbers of replay engines; empty for none")
    parser.add_argument("--decode", default="2", help="numbers of engines that decode; empty for none")
    parser.add_argument("--rate", type=float, default=10.0, help="trajectories per second and engine, paced")
    parser.add_argument("--idle-seconds", type=float, default=5.0)
    parser.add_argument("--flood-seconds", type=float, default=5.0)
    parser.add_argument("--paced-seconds", type=float, default=12.0)
    parser.add_argument("--publications", type=int, default=8)
    parser.add_argument("--weights-mb", type=float, default=16.0)
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size of the large trajectories")
    parser.add_argument("--simulate", type=Path, help="earlier result whose costs the simulation takes")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--name", help="name of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    if options.simulate is not None:
        options.name = options.name or "fleet_simulated"
        write_result(__file__, options, simulated(costs_of(options.simulate)))
        return
    FORKED.set_forkserver_preload(PRELOADED)
    figures: dict[str, Any] = {"note": options.note, "large": cell(options, "replay", 1, options.hidden), "cells": []}
    wanted = [("replay", count) for count in options.engines.split(",") if count]
    wanted += [("decode", count) for count in options.decode.split(",") if count]
    for kind, count in wanted:
        figures["cells"].append(cell(options, kind, int(count)))
        write_result(__file__, options, figures)  # the run takes minutes, and may be stopped


if __name__ == "__main__":
    main()
