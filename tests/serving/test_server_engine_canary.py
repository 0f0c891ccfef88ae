"""Three servers on one learner's wire: weights reach one of them first, and what it serves decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from oracle_server import HANDSHAKE, LOCAL, Oracle, Serving, Wrong, endless, requests
from torch import Tensor

from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.weights import WeightPublisher, WeightReceiver
from aurora_rl.policies import Proposal, TreeShape
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.training.engine_canary import EngineCanary, EngineTrialRules

RIGHT, WRONG = {"right": torch.ones(1)}, {"right": torch.zeros(1)}


class Weighted(Wrong):
    """Proposes the target's text or another, as its weights say."""

    right = RIGHT["right"]

    def published(self) -> dict[str, Tensor]:
        return {"right": self.right}

    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        return lambda: setattr(self, "right", weights["right"].clone())

    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        if bool(self.right):
            return Oracle.propose(self, slots, shape, generator)
        return super().propose(slots, shape, generator)


class Fleet:
    """A learner's wire with its canary, and three servers."""

    def __init__(self, folder: Path) -> None:
        self.publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
        self.collector = ZMQCollector(LOCAL, handshake=HANDSHAKE)
        self._log = MetricsLog(folder / "learner.jsonl", "learner")
        rules = EngineTrialRules(share=0.3, requests=2, false_alarm_rate=0.5)
        self.canary, self.known = EngineCanary(self.publisher, rules, self._log), requests(5)
        self.servers = list[Serving]()
        for name in ("a", "b", "c"):
            (folder / name).mkdir()
            wire = {"handshake": HANDSHAKE, "name": name}
            ends = {
                "receiver": WeightReceiver(self.publisher.address, **wire),
                "sink": TrajectorySink(self.collector.address, **wire),
            }
            self.servers.append(Serving(folder / name, [], Weighted(self.known), slots=2, **ends))
        self._requests = [endless(self.known) for _ in self.servers]

    def publish(self, weights: dict[str, Tensor]) -> int:
        version = self.publisher.next_version
        self.publisher.publish(version, weights)
        return version

    def serve_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, "it did not happen in time"
            for serving, source in zip(self.servers, self._requests, strict=True):
                while len(serving.queue) < 2:
                    serving.queue.append(next(source))
                serving.server.step()
            self.canary.follow(self.collector.poll(), self.publish)

    def all_serve(self, version: int) -> bool:
        return all(serving.policy.version == version for serving in self.servers)

    def events(self, kind: str) -> list[dict]:
        return [event for event in MetricsReader(self._log.path) if event["event"] == kind]

    def close(self) -> None:
        for serving in self.servers:
            serving.server.close()
        self.collector.shutdown()
        self.publisher.close()


@pytest.fixture
def fleet(tmp_path: Path, quick_heartbeats: None) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.close()


def test_a_sabotaged_version_serves_at_one_server_of_three_and_is_taken_back(fleet: Fleet) -> None:
    before = fleet.publish(RIGHT)
    fleet.serve_until(lambda: fleet.all_serve(before))
    version = fleet.canary.begin(WRONG, RIGHT, before)
    most = 0

    def ended() -> bool:
        nonlocal most
        most = max(most, sum(not bool(serving.policy.drafter.right) for serving in fleet.servers))
        return not fleet.canary.trying

    fleet.serve_until(ended)
    (verdict,) = fleet.events("engine_verdict")
    fleet.serve_until(lambda: all(bool(serving.policy.drafter.right) for serving in fleet.servers))
    assert most == 1 and verdict["version"] == version and not verdict["promote"]
    assert verdict["reason"].startswith("acceptance length")
    assert verdict["acceptance_length"]["old"] > 3 and verdict["acceptance_length"]["new"] == 1
    assert verdict["tokens_per_second"]["old"] > verdict["tokens_per_second"]["new"] > 0
    assert sum(serving.server.stats.versions == [0, before] for serving in fleet.servers) == 1  # outside of the trial
    for serving in fleet.servers:
        serving.check_texts()
