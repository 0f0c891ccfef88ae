"""The sink: serving is never blocked, and what is lost is counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
import zmq
from processes import wait
from tensordict import NonTensorData, TensorDict
from torchrl.collectors import Collector
from torchrl.testing.mocking_classes import CountingEnv

from aurora_rl.collectors.codec import Limits, Message, decode
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.sink import DELETION, TRAJECTORY, TrajectorySink
from aurora_rl.collectors.sockets import bind, open_socket

HANDSHAKE = Handshake(1, "config", "head", (2, 5), "", "eagle3")


def item(number: int, size: int = 1) -> TensorDict:
    return TensorDict({"sequence": {"tokens": torch.full((size,), number)}}, batch_size=[])


class Learner:
    """A bare PULL socket."""

    def __init__(self, address: str = "tcp://127.0.0.1:*", high_water: int = 1000) -> None:
        self.socket = open_socket(zmq.PULL)
        self.socket.rcvhwm = high_water
        self.address = bind(self.socket, address)

    def receive(self, count: int) -> list[int]:
        numbers = []
        while len(numbers) < count and self.socket.poll(10_000):
            message = decode(self.socket.recv_multipart(copy=False))
            assert message.kind == TRAJECTORY and Handshake.from_meta(message.meta["handshake"]) == HANDSHAKE
            numbers.append(int(message.tensors["sequence", "tokens"][0]))
        return numbers

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def free() -> Iterator[str]:
    learner = Learner()
    learner.close()
    yield learner.address


def test_everything_arrives_in_order() -> None:
    learner = Learner()
    with closing(TrajectorySink(learner.address, handshake=HANDSHAKE)) as sink:
        for number in range(50):
            sink.extend(item(number))
        assert learner.receive(50) == list(range(50))
        wait(lambda: sink.sent == 50)
        assert (sink.drops.total(), sink.queued) == (0, 0)
    learner.close()


def test_without_a_learner_it_never_blocks_and_a_late_one_gets_the_newest(free: str) -> None:
    sink = TrajectorySink(free, handshake=HANDSHAKE, capacity=16)
    start = time.monotonic()
    for number in range(10_000):
        sink.extend(item(number) if number >= 9_984 else EMPTY)
        assert sink.queued <= 16
    assert time.monotonic() - start < 5
    assert (sink.sent, sink.drops.total(), sink.drops["no_learner"], sink.queued) == (0, 9_984, 9_984, 16)
    learner = Learner(free)
    assert learner.receive(16) == list(range(9_984, 10_000))
    sink.close()
    assert (sink.sent, sink.drops.total(), sink.drops["no_learner"]) == (16, 9_984, 9_984)
    learner.close()


EMPTY = TensorDict({}, batch_size=[])


def test_a_learner_that_does_not_read_stalls_nothing() -> None:
    learner = Learner(high_water=1)
    sink = TrajectorySink(learner.address, handshake=HANDSHAKE, capacity=4)
    sink.extend(item(0, 500_000))
    wait(lambda: sink.sent == 1)  # the learner is connected
    for number in range(1, 40):  # 4 MB each: more than the buffers of the kernel hold
        sink.extend(item(number, 500_000))
    wait(lambda: sink.queued == 4)
    assert sink.drops.total() > 0 and sink.sent + sink.drops.total() + sink.queued == 40
    start = time.monotonic()
    sink.close(0.2)
    assert time.monotonic() - start < 2
    assert sink.sent + sink.drops.total() == 40
    assert sink.drops["no_learner"] == 0  # it was there all the time
    learner.close()


def test_a_restarted_learner_goes_on_receiving() -> None:
    first = Learner()
    sink = TrajectorySink(first.address, handshake=HANDSHAKE)
    sink.extend(item(1))
    assert first.receive(1) == [1]
    first.close()
    second = Learner(first.address)
    number, got = 1, []
    deadline = time.monotonic() + 10
    while not got and time.monotonic() < deadline:  # those sent before the disconnection is noticed are lost
        number += 1
        sink.extend(item(number))
        if second.socket.poll(50):
            got = second.receive(1)
    assert got
    sink.close()
    second.close()


def test_what_is_dropped_between_two_learners_is_missed_and_what_waits_is_not() -> None:
    first = Learner()
    sink = TrajectorySink(first.address, handshake=HANDSHAKE, capacity=2)
    sink.extend(item(0))
    assert first.receive(1) == [0]
    wait(lambda: sink.connected)
    first.close()
    wait(lambda: not sink.connected)
    for number in range(1, 6):
        sink.extend(item(number))
    assert (sink.sent, sink.drops.total(), sink.drops["no_learner"], sink.queued) == (1, 3, 3, 2)
    second = Learner(first.address)
    assert second.receive(2) == [4, 5]
    sink.close()
    assert (sink.sent, sink.drops.total(), sink.drops["no_learner"]) == (3, 3, 3)
    second.close()


def test_close_flushes_to_a_slow_starting_learner(free: str) -> None:
    sink = TrajectorySink(free, handshake=HANDSHAKE)
    for number in range(5):
        sink.extend(item(number))
    learner = Learner(free)
    sink.close(10.0)
    assert learner.receive(5) == [0, 1, 2, 3, 4]
    assert (sink.sent, sink.drops.total()) == (5, 0)
    learner.close()


def test_close_without_a_learner_is_bounded_idempotent_and_counts(free: str) -> None:
    sink = TrajectorySink(free, handshake=HANDSHAKE)
    for number in range(3):
        sink.extend(item(number))
    start = time.monotonic()
    sink.close(0.1)
    sink.close(0.1)
    assert time.monotonic() - start < 1.5
    assert (sink.sent, sink.drops.total(), sink.drops["no_learner"], sink.queued) == (0, 3, 3, 0)
    sink.extend(item(4))  # too late, and still no error
    assert (sink.drops.total(), sink.queued) == (4, 0)


def test_what_cannot_be_encoded_is_dropped_and_the_rest_goes_on() -> None:
    learner = Learner()
    with closing(TrajectorySink(learner.address, handshake=HANDSHAKE)) as sink:
        sink.extend(TensorDict({"text": NonTensorData("prompt")}, batch_size=[]))
        sink.extend(item(7))
        assert learner.receive(1) == [7]
        assert (sink.drops.total(), sink.drops["no_learner"]) == (1, 0)
    learner.close()


def test_errors_of_the_caller() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        TrajectorySink("tcp://127.0.0.1:1", handshake=HANDSHAKE, capacity=0)
    with pytest.raises(OSError, match="cannot connect to 'nonsense'"):
        TrajectorySink("nonsense", handshake=HANDSHAKE)


def test_it_serves_as_a_replay_buffer_of_a_torchrl_collector() -> None:
    learner = Learner()
    with closing(TrajectorySink(learner.address, handshake=HANDSHAKE)) as sink:
        collector = Collector(CountingEnv(max_steps=5), None, frames_per_batch=10, total_frames=30, replay_buffer=sink)
        assert list(collector) == [None, None, None]
        collector.shutdown()
        for _ in range(3):
            assert learner.socket.poll(10_000)
            assert decode(learner.socket.recv_multipart()).tensors["next", "reward"].shape == (10, 1)
    learner.close()


def test_the_queue_is_bounded_in_bytes_and_one_that_is_too_large_displaces_nobody(free: str) -> None:
    sink = TrajectorySink(free, handshake=HANDSHAKE, max_bytes=8_000, limits=Limits(max_bytes=1 << 16))
    for number in range(10):
        sink.extend(item(number, 250))  # 2,000 bytes
        assert sink.queued <= 4
    sink.extend(item(10, 1_001))
    assert (sink.queued, sink.drops["no_learner"], sink.drops["too_large"]) == (4, 6, 1)
    learner = Learner(free)
    assert learner.receive(4) == [6, 7, 8, 9]
    wait(lambda: sink.sent == 4)
    sink.extend(item(11, 1_000))  # they have left room
    assert learner.receive(1) == [11]
    sink.close()
    learner.close()


def test_a_trajectory_that_no_message_can_hold_is_dropped_here(free: str) -> None:
    sink = TrajectorySink(free, handshake=HANDSHAKE, limits=Limits(max_bytes=1 << 16))
    sink.extend(item(0, 8_000))
    sink.extend(item(1, 6_000))
    assert (sink.queued, sink.drops["too_large"]) == (1, 1)
    sink.close()


def messages(learner: Learner, count: int) -> list[Message]:
    return [decode(learner.socket.recv_multipart(copy=False)) for _ in range(count) if learner.socket.poll(10_000)]


def test_a_deletion_drops_what_waits_of_the_tenant_and_reaches_whoever_connects(free: str) -> None:
    began, sink = time.time(), TrajectorySink(free, handshake=HANDSHAKE, max_bytes=2_400)
    for number, tenant in enumerate(["a", None, "b", "a"]):
        sink.extend(item(number, 50), tenant)
    assert (sink.delete("a"), sink.delete("a"), sink.queued) == (2, 0, 2)
    sink.extend(item(4, 200), "a")  # newer, and there is room for it again
    assert (sink.queued, sink.drops.total()) == (3, 0)
    first = Learner(free)
    deletion, *kept = sorted(messages(first, 4), key=lambda message: message.kind)
    assert (deletion.kind, deletion.meta["tenant"], deletion.tensors.keys()) == (DELETION, "a", {}.keys())
    assert Handshake.from_meta(deletion.meta["handshake"]) == HANDSHAKE
    assert [each.meta["tenant"] for each in kept] == [None, "b", "a"]
    times = [each.meta["captured"] for each in kept]
    assert began <= times[0] <= times[1] <= deletion.meta["before"] <= times[2] <= time.time()

    first.close()
    wait(lambda: not sink.connected)
    sink.delete("b")
    second = Learner(free)  # another, or one that has lost what was on its way
    told = {each.meta["tenant"]: (each.kind, each.meta["before"]) for each in messages(second, 2)}
    assert told["a"] == (DELETION, deletion.meta["before"]) and told["b"][1] > times[2]
    sink.extend(item(5))
    assert second.receive(1) == [5] and not second.socket.poll(50)  # each once
    sink.close()
    second.close()


def test_what_waits_for_too_long_is_dropped(free: str) -> None:
    sink = TrajectorySink(free, handshake=HANDSHAKE, max_age=1.0)
    sink.extend(item(0))
    wait(lambda: sink.drops.total() > 0)
    assert (sink.drops["expired"], sink.drops.total(), sink.queued) == (1, 1, 0)
    learner = Learner(free)
    wait(lambda: sink.connected)  # the next one is sent at once, and not when a learner has been found
    sink.extend(item(1))
    assert learner.receive(1) == [1]
    sink.close()
    learner.close()


def test_the_deletions_that_are_told_again_are_bounded(free: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aurora_rl.collectors.sink.MAX_DELETIONS", 3)
    sink = TrajectorySink(free, handshake=HANDSHAKE)
    for tenant in ("a", "b", "a", "c", "d"):
        sink.delete(tenant)
    assert list(sink._deletions) == ["a", "c", "d"]
    sink.close(0.0)
