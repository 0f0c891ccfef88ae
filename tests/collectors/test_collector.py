"""The collector: polling, and what it refuses."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
import torch
import zmq
from tensordict import TensorDict, TensorDictBase

from aurora_rl.collectors.codec import encode
from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.sink import DELETION, TRAJECTORY, TrajectorySink

HANDSHAKE = Handshake(1, "config", "head", (2, 5), "", "eagle3")
LOCAL = "tcp://127.0.0.1:*"


def item(number: int) -> TensorDict:
    return TensorDict({"sequence": {"tokens": torch.full((number % 3 + 1,), number)}}, batch_size=[])


def numbers(batch: list[TensorDict]) -> list[int]:
    return [int(trajectory["sequence", "tokens"][0]) for trajectory in batch]


def no_negatives(trajectory: TensorDictBase) -> None:
    if (trajectory["sequence", "tokens"] < 0).any():
        raise ValueError("negative tokens")


def poll(collector: ZMQCollector, count: int) -> list[int]:
    got: list[int] = []
    deadline = time.monotonic() + 10
    while len(got) < count and time.monotonic() < deadline:
        got += numbers(collector.poll(0.1))
    return got


@pytest.fixture
def collector() -> Iterator[ZMQCollector]:
    collector = ZMQCollector(LOCAL, handshake=HANDSHAKE, validate=no_negatives)
    yield collector
    collector.shutdown()


def test_what_is_accepted_is_recorded_and_nothing_else() -> None:
    recorded: list[TensorDictBase] = []
    collector = ZMQCollector(LOCAL, handshake=HANDSHAKE, validate=no_negatives, on_trajectory=recorded.append)
    with closing(TrajectorySink(collector.address, handshake=HANDSHAKE)) as sink:
        for number in (1, -1, 2):
            sink.extend(item(number))
        assert poll(collector, 2) == [1, 2]
    assert numbers(recorded) == [1, 2]  # type: ignore[arg-type]
    collector.shutdown()


def test_poll_waits_for_the_first_only_and_takes_high_water_at_most() -> None:
    collector = ZMQCollector(LOCAL, handshake=HANDSHAKE, high_water=2)
    assert collector.poll() == []
    start = time.monotonic()
    assert collector.poll(0.05) == []
    assert 0.04 < time.monotonic() - start < 1
    with closing(TrajectorySink(collector.address, handshake=HANDSHAKE)) as sink:
        for number in range(5):
            sink.extend(item(number))
        until_sent = time.monotonic() + 10
        while sink.sent < 5 and time.monotonic() < until_sent:
            time.sleep(0.002)
    assert numbers(collector.poll(10.0)) == [0, 1]
    assert poll(collector, 3) == [2, 3, 4]
    collector.shutdown()


def test_a_late_collector_gets_what_the_sink_kept() -> None:
    first = ZMQCollector(LOCAL, handshake=HANDSHAKE)
    address = first.address
    first.shutdown()
    with closing(TrajectorySink(address, handshake=HANDSHAKE)) as sink:
        sink.extend(item(5))
        late = ZMQCollector(address, handshake=HANDSHAKE)
        assert poll(late, 1) == [5]
        late.shutdown()


def test_bad_messages_are_dropped_counted_and_logged_once(
    collector: ZMQCollector, caplog: pytest.LogCaptureFixture
) -> None:
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.connect(collector.address)
    meta = {"handshake": HANDSHAKE.to_meta()}
    stranger = {"handshake": replace(HANDSHAKE, feature_layers=(2, 6)).to_meta()}
    with caplog.at_level(logging.WARNING):
        push.send_multipart([b"garbage"])
        push.send_multipart([b"garbage", b""])
        push.send_multipart(encode("weights", meta, item(1)))
        push.send_multipart(encode(TRAJECTORY, {}, item(1)))
        push.send_multipart(encode(TRAJECTORY, stranger, item(1)))
        push.send_multipart(encode(TRAJECTORY, meta, item(-1)))
        push.send_multipart(encode(TRAJECTORY, meta, {"other": torch.zeros(1)}))  # a KeyError in validate
        push.send_multipart(encode(TRAJECTORY, meta, item(9)))
        assert poll(collector, 1) == [9]
    assert collector.rejections == {"malformed": 4, "handshake": 1, "invalid": 2}
    assert collector.rejected == 7
    assert (collector.handshake_error or "").startswith(
        "handshake mismatch: feature_layers is (2, 5) at the learner and (2, 6) at the engine"
    )
    assert [record.getMessage().split(", ")[1].split(":")[0] for record in caplog.records] == [
        *("malformed", "handshake", "invalid")
    ]
    assert "header is not JSON" in caplog.text and "negative tokens" in caplog.text
    push.close(0)
    context.term()


def test_a_flood_of_bad_messages_does_not_hold_poll() -> None:
    collector = ZMQCollector(LOCAL, handshake=HANDSHAKE, high_water=8)
    stop = threading.Event()

    def flood() -> None:
        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.linger = 0
            push.connect(collector.address)
            while not stop.is_set():
                if push.poll(10, zmq.POLLOUT):
                    push.send(b"garbage")

    thread = threading.Thread(target=flood)
    thread.start()
    deadline = time.monotonic() + 10
    while collector.rejected < 100 and time.monotonic() < deadline:
        start = time.monotonic()
        assert collector.poll(0.0) == []
        assert time.monotonic() - start < 1
    assert collector.rejected >= 100
    stop.set()
    thread.join()
    collector.shutdown()


def test_one_poll_looks_at_no_more_messages_than_the_socket_holds(
    collector: ZMQCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    arriving = iter([[zmq.Frame(b"garbage")]] * 1000)  # bad ones that come as fast as they are read
    monkeypatch.setattr(collector, "_receive", lambda timeout_s: next(arriving, None))
    assert collector.poll(0.0) == [] and collector.rejected == 64


def test_port_in_use(collector: ZMQCollector) -> None:
    with pytest.raises(OSError, match=f"{collector.address} is in use; stop the process that holds it or choose"):
        ZMQCollector(collector.address, handshake=HANDSHAKE)


def test_shutdown_from_another_thread_ends_a_poll(collector: ZMQCollector) -> None:
    timer = threading.Timer(0.1, collector.shutdown)
    timer.start()
    began = time.monotonic()
    assert collector.poll(20.0) == [] and time.monotonic() - began < 10
    timer.join()
    collector.shutdown()
    assert collector.poll() == []


def test_errors_of_the_caller() -> None:
    with pytest.raises(ValueError, match="must be positive, got 0"):
        ZMQCollector(LOCAL, handshake=HANDSHAKE, high_water=0)


def test_a_trajectory_has_its_tenant_and_time_and_a_deletion_its_bound(collector: ZMQCollector) -> None:
    got: list[TensorDict] = []
    with closing(TrajectorySink(collector.address, handshake=HANDSHAKE)) as sink:
        began = time.time()
        sink.extend(item(1), "a", 2.5)
        sink.extend(item(2))
        while len(got) < 2:
            got += collector.poll(1.0)
        assert [each.get_non_tensor("tenant") for each in got] == ["a", ""]
        assert [each.get_non_tensor("seconds") for each in got] == [2.5, None]
        assert began <= got[0].get_non_tensor("captured") <= got[1].get_non_tensor("captured") <= time.time()
        sink.delete("a")
        deadline = time.monotonic() + 10
        while not (deletions := collector.take_deletions()) and time.monotonic() < deadline:
            assert collector.poll(0.05) == []
    assert deletions.keys() == {"a"} and got[1].get_non_tensor("captured") <= deletions["a"] <= time.time()
    assert collector.take_deletions() == {} and collector.rejected == 0


@pytest.mark.parametrize(
    ("kind", "meta"),
    [
        (DELETION, {"before": 1.0}),
        (DELETION, {"tenant": None, "before": 1.0}),
        (DELETION, {"tenant": "a/b", "before": 1.0}),
        (DELETION, {"tenant": "a" * 129, "before": 1.0}),
        (DELETION, {"tenant": "a"}),
        (DELETION, {"tenant": "a", "before": "now"}),
        (DELETION, {"tenant": "a", "before": 1e300}),
        (DELETION, {"tenant": "a", "before": True}),
        (DELETION, {"tenant": "a", "before": 1.0, "tensors": True}),
        (DELETION, {"tenant": "a", "before": 1.0, "handshake": {}}),
        (TRAJECTORY, {"tenant": ["a"]}),
        (TRAJECTORY, {"tenant": ""}),
        (TRAJECTORY, {"captured": "now"}),
        (TRAJECTORY, {"seconds": 0}),
        (TRAJECTORY, {"seconds": 1e300}),
    ],
)
def test_a_malformed_deletion_or_mark_of_a_trajectory_is_dropped(
    collector: ZMQCollector, kind: str, meta: dict[str, object]
) -> None:
    has_tensors = kind == TRAJECTORY or meta.pop("tensors", False)
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.linger = 0
        push.connect(collector.address)
        push.send_multipart(encode(kind, {"handshake": HANDSHAKE.to_meta(), **meta}, item(1) if has_tensors else None))
        push.send_multipart(encode(TRAJECTORY, {"handshake": HANDSHAKE.to_meta(), "captured": 1e18}, item(9)))
        (last,) = [each for _ in range(10) for each in collector.poll(0.1 if collector.rejected else 5.0)][-1:]
    assert collector.rejections == {"malformed": 1} and collector.take_deletions() == {}
    # What an engine of an earlier release leaves out; and a clock that is ahead makes nothing live longer.
    assert last.get_non_tensor("tenant") == "" and time.time() - 20 < last.get_non_tensor("captured") <= time.time()
