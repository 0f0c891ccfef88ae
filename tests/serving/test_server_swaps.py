"""Weights from the wire: swapped between rounds, refused by name, acknowledged in order; and nobody there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from oracle_server import HANDSHAKE, LOCAL, Oracle, Serving, eagle, endless, requests
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.sockets import bind, open_socket
from aurora_rl.collectors.weights import WeightPublisher, WeightReceiver
from aurora_rl.envs import Request


class Wire:
    """A publisher and a receiver over a socket, as between the two processes."""

    def __init__(self) -> None:
        self.publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
        self.receiver = WeightReceiver(self.publisher.address, handshake=HANDSHAKE, name="engine")

    def close(self) -> None:
        self.receiver.close()
        self.publisher.close()


@pytest.fixture
def wire(quick_heartbeats: None) -> Iterator[Wire]:
    ends = Wire()
    yield ends
    ends.close()


def serve_until(serving: Serving, source: Iterator[Request], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        while len(serving.queue) < 3:
            serving.queue.append(next(source))
        assert serving.server.step()


def test_swaps_while_requests_are_in_flight(tmp_path: Path, wire: Wire) -> None:
    source, publisher = endless(requests(5)), wire.publisher
    serving = Serving(tmp_path, [], eagle(), slots=3, receiver=wire.receiver)
    server = serving.server
    serve_until(serving, source, lambda: len(serving.completions) >= 2)
    for version in (1, 2, 3):
        publisher.publish(version, eagle(version).published())
        serve_until(serving, source, lambda version=version: publisher.wait_ack(version, 0))
    serving.queue.clear()
    serving.run()

    # Acknowledged with the checksum of what the drafter holds, which is that of what was published.
    status = publisher.engines["engine"]
    assert (status.acknowledged, status.serving, status.rejected) == (3, 3, None)
    assert checksum(serving.policy.drafter.published()) == checksum(eagle(3).published())
    assert (
        server.stats.versions == [0, 1, 2, 3]
        and len(server.stats.swap_ms) == 3
        and status.swap_ms == server.stats.swap_ms[-1]
    )
    assert [event["version"] for event in serving.events("swap")] == [1, 2, 3]
    # None dropped, all right: every request that was taken is among the completions.
    assert sorted(c.request.id for c in serving.completions) == list(range(len(serving.completions)))
    assert len(server.stats.finished) == len(serving.completions) and serving.engine.store.lengths.tolist() == [0, 0, 0]
    serving.check_texts()
    # Recorded: versions rise within a request, and each swap fell into the middle of one.
    versions = [c.trajectory["rounds", "policy_version"].tolist() for c in serving.completions]
    assert all(v == sorted(v) for v in versions)
    pairs = {pair for v in versions for pair in zip(v, v[1:], strict=False) if pair[0] != pair[1]}
    assert {(0, 1), (1, 2), (2, 3)} <= pairs
    assert all(torch.equal(c.trajectory["rounds", "cache_version"], c.trajectory["rounds", "policy_version"])
               for c in serving.completions)  # fmt: skip
    assert server.stats.summary(failed=0, duration_s=1.0)["versions_served"] == [0, 1, 2, 3]


def test_weights_of_another_shape_are_rejected_and_serving_goes_on(tmp_path: Path, wire: Wire) -> None:
    source, publisher = endless(requests(3)), wire.publisher
    serving = Serving(tmp_path, [], eagle(), slots=2, receiver=wire.receiver)
    before = checksum(serving.policy.drafter.published())
    wrong = eagle(1).published()
    wrong["lm_head.weight"] = wrong["lm_head.weight"][:-1]
    publisher.publish(1, wrong)
    serve_until(serving, source, lambda: any(s.rejected for s in publisher.engines.values()))
    version, reason = publisher.engines["engine"].rejected
    assert version == 1 and "tensor 'lm_head.weight' has shape (5, 16), this drafter needs (6, 16)" in reason
    assert serving.policy.version == 0 and checksum(serving.policy.drafter.published()) == before
    assert serving.server.stats.swap_ms == [] and serving.server.stats.versions == [0]
    (event,) = serving.events("swap_failed")
    assert event["version"] == 1 and event["reason"] == reason
    publisher.publish(2, eagle(2).published())  # better ones are taken
    serve_until(serving, source, lambda: publisher.wait_ack(2, 0))
    assert serving.server.stats.versions == [0, 2]
    serving.queue.clear()
    serving.run()
    serving.check_texts()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_rejected_and_serving_goes_on(tmp_path: Path, wire: Wire, value: float) -> None:
    source, publisher = endless(requests(3)), wire.publisher
    serving = Serving(tmp_path, [], eagle(), slots=2, receiver=wire.receiver)
    broken = {name: tensor.clone() for name, tensor in eagle(1).published().items()}
    broken["lm_head.weight"][0, :2] = value
    publisher.publish(1, broken)
    serve_until(serving, source, lambda: any(s.rejected for s in publisher.engines.values()))
    version, reason = publisher.engines["engine"].rejected
    assert version == 1 and "'lm_head.weight' has 2 values that are infinite or not a number; lower" in reason
    assert serving.server.stats.versions == [0] and serving.server.stats.drafter_faults == 0
    serving.queue.clear()
    serving.run()
    serving.check_texts()


def test_acknowledgements_keep_the_order_of_the_swaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Receiver:
        """Two versions in neighbouring rounds."""

        waiting = [(v, TensorDict(eagle(v).published(), batch_size=[])) for v in (2, 1)]
        acknowledged: list[tuple[int, str]] = []

        def latest(self) -> tuple[int, TensorDict] | None:
            return self.waiting.pop() if self.waiting else None

        def acknowledge(self, version: int, digest: str, swap_ms: float) -> None:
            self.acknowledged.append((version, digest))

    first = threading.Event()

    def slow_at_first(tensors: dict[str, Tensor]) -> str:
        if not first.is_set():
            first.set()
            time.sleep(0.2)  # time enough to swap in the second and hash it
        return checksum(tensors)

    monkeypatch.setattr("aurora_rl.serving.versions.checksum", slow_at_first)
    receiver = Receiver()
    serving = Serving(tmp_path, [], eagle(), receiver=receiver)
    serve_until(serving, endless(requests(3)), lambda: len(receiver.acknowledged) == 2)
    # An engine that reported 2 and then 1 would be sent version 2 again.
    assert receiver.acknowledged == [(v, checksum(eagle(v).published())) for v in (1, 2)]


def test_nobody_listens(tmp_path: Path) -> None:
    # An address at which nothing is: what cannot be sent is dropped and counted, and every answer is given.
    socket = open_socket(0)
    address = bind(socket, LOCAL)
    socket.close()
    sink = TrajectorySink(address, handshake=HANDSHAKE, capacity=2)
    receiver = WeightReceiver(address, handshake=HANDSHAKE)
    waiting = requests(5)
    serving = Serving(tmp_path, waiting, Oracle(waiting), slots=2, sink=sink, receiver=receiver)
    server = serving.run()
    assert len(serving.completions) == 5 and server.stats.summary(drops=server.drops)["dropped_trajectories"] == 3
    assert sink.queued == 2
    serving.check_texts()
    receiver.close()
    sink.close(timeout=0.0)
    assert server.stats.summary(drops=server.drops)["dropped_trajectories"] == 5 == server.drops["no_learner"]
