"""Hostile peers on real sockets: others are served meanwhile, and what is held for them is bounded."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq
from processes import wait
from tensordict import TensorDict
from zmtp_peers import GREETING, part, peer

from aurora_rl.collectors import relay
from aurora_rl.collectors.codec import Limits
from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import engine_keys, learner_keys, make_keys
from aurora_rl.collectors.relay import Relay
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.sockets import connect, open_socket

HANDSHAKE = Handshake(1, "config", "head", (2, 5), "", "eagle3")
LOCAL = "tcp://127.0.0.1:*"
MIB = 1 << 20


@pytest.fixture(params=["plain", "sealed"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    if request.param == "plain":
        return None
    make_keys(tmp_path)
    return tmp_path


@pytest.fixture
def collector(keys: Path | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[ZMQCollector]:
    monkeypatch.setattr(relay, "_LEAST_TOTAL", 2 * MIB)
    monkeypatch.setattr(relay, "_STALL_S", 0.2)
    own = None if keys is None else learner_keys(keys)
    collector = ZMQCollector(LOCAL, handshake=HANDSHAKE, keys=own, limits=Limits(max_bytes=MIB, max_leaves=64))
    yield collector
    collector.shutdown()


def sink_of(collector: ZMQCollector, keys: Path | None) -> TrajectorySink:
    return TrajectorySink(collector.address, handshake=HANDSHAKE, keys=None if keys is None else engine_keys(keys))


def receives(collector: ZMQCollector, sink: TrajectorySink) -> bool:
    sink.extend(TensorDict({"x": torch.arange(3)}, batch_size=[]))
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if collector.poll(0.1):
            return True
    return False


def relay_of(collector: ZMQCollector) -> Relay:
    found = collector._socket.relay
    assert found is not None
    return found


def test_an_admitted_engine_that_never_ends_its_message_is_cut_off(collector: ZMQCollector, keys: Path | None) -> None:
    """By libzmq's own sender, so that the end of its message is as hidden as CurveZMQ hides it: 8 MiB in 32 parts."""
    hostile = open_socket(zmq.PUSH)
    hostile.watch_peer()
    connect(hostile, collector.address, keys=None if keys is None else engine_keys(keys))
    wait(lambda: hostile.connected)
    honest = sink_of(collector, keys)
    assert receives(collector, honest)
    hostile.send_multipart([bytes(MIB // 4)] * 32)
    closed, most, deadline = False, 0, time.monotonic() + 30
    while not closed and time.monotonic() < deadline:
        collector.poll(0.05)
        most = max(most, relay_of(collector)._inside.total())
        closed = relay_of(collector)._warned
    assert closed and most <= 3 * MIB
    assert receives(collector, honest)
    assert collector.rejected == 0  # nothing of it was read
    hostile.close()
    honest.close()


def test_a_reader_that_does_not_read_lets_engines_wait(collector: ZMQCollector, keys: Path | None) -> None:
    sinks = [sink_of(collector, keys) for _ in range(4)]
    for number in range(40):
        for sink in sinks:
            sink.extend(TensorDict({"x": torch.full((20_000,), number)}, batch_size=[]))  # 160 KB
    inside = relay_of(collector)
    wait(lambda: inside._inside.total() > 2 * MIB)
    held = []
    for _ in range(20):
        held.append(inside._inside.total())
        time.sleep(0.02)
    assert max(held) <= 2 * MIB + 4 * (relay._CHUNK + 200_000)
    got = 0
    deadline = time.monotonic() + 30
    while got < 160 and time.monotonic() < deadline:
        got += len(collector.poll(0.1))
    assert got == 160 and not any(sink.drops.total() for sink in sinks)
    wait(lambda: inside._inside.total() <= 64 * 160)  # of pings, under CurveZMQ
    for sink in sinks:
        sink.close()


def test_a_thousand_silent_connections_keep_no_engine_out(
    collector: ZMQCollector, keys: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "_MAX_CONNECTIONS", 32)
    early = sink_of(collector, keys)
    assert receives(collector, early)
    host, port = collector.address.removeprefix("tcp://").rsplit(":", 1)
    with contextlib.ExitStack() as opened:
        for number in range(1000):
            raw = opened.enter_context(socket.create_connection((host, int(port)), timeout=10))
            with contextlib.suppress(OSError):
                raw.sendall(GREETING[: number % 65])
        assert len(relay_of(collector)._relays) <= 64
        late = sink_of(collector, keys)
        assert receives(collector, early) and receives(collector, late)
        late.close()
    early.close()


@pytest.mark.parametrize("keys", ["plain"], indirect=True)  # with keys, a stranger comes no further than above
def test_a_slow_sender_holds_nobody_up(collector: ZMQCollector) -> None:
    slow = peer(collector.address, b"PUSH")
    message, sink = part(bytes(1000), more=False), sink_of(collector, None)
    for at in range(20):
        slow.sendall(message[at : at + 1])
        assert receives(collector, sink)
    slow.close()
    sink.close()
