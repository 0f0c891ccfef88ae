"""Peers that write ZMTP by hand and never end a message: they lose their connection, the others are served."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator

import pytest
import torch
import zmq
from processes import wait
from tensordict import TensorDict
from zmtp_peers import GREETING, PING, part, peer, shake_hands

from aurora_rl.collectors import relay
from aurora_rl.collectors.codec import Limits, encode
from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.relay import Meter, TooLongError
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.sockets import bind, open_socket
from aurora_rl.collectors.weights import WeightPublisher, WeightReceiver
from aurora_rl.envs.remote.plugin_server import PluginServer, ask

HANDSHAKE = Handshake(1, "config", "head", (2, 5), "", "eagle3")
LOCAL = "tcp://127.0.0.1:*"
MIB = 1 << 20


def sends(raw: socket.socket, data: bytes, times: int) -> bool:
    """Whether all of it could be sent; a connection that is closed meanwhile, or stalls, cannot take it."""
    with raw:
        try:
            for _ in range(times):
                raw.sendall(data)
        except OSError:
            return False
        return True


@pytest.fixture
def collector() -> Iterator[ZMQCollector]:
    collector = ZMQCollector(LOCAL, handshake=HANDSHAKE, limits=Limits(max_bytes=MIB, max_leaves=64))
    yield collector
    collector.shutdown()


def receives(collector: ZMQCollector) -> bool:
    with contextlib.closing(TrajectorySink(collector.address, handshake=HANDSHAKE)) as sink:
        sink.extend(TensorDict({"x": torch.arange(3)}, batch_size=[]))
        wait(lambda: sink.sent == 1)
        return len(collector.poll(10)) == 1


# Of small bodies the parts are too many before the bytes are.
@pytest.mark.parametrize("data", [part(bytes(MIB // 8)), part(b"x") * 1024, PING + part(bytes(MIB // 8))])
def test_a_message_without_end_costs_the_peer_its_connection(
    collector: ZMQCollector, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not sends(peer(collector.address, b"PUSH"), data, 2000)
        assert not sends(peer(collector.address, b"PUSH"), data, 2000)
    assert len(caplog.messages) == 1 and "more than the 1048576 bytes or 128 parts" in caplog.messages[0]
    assert receives(collector)


def test_the_weight_publisher_and_the_plugin_server_close_such_connections() -> None:
    publisher, plugin = WeightPublisher(LOCAL, handshake=HANDSHAKE), PluginServer(LOCAL, lambda kind, fields: fields)
    for address in (publisher.address, plugin.address):
        assert not sends(peer(address, b"DEALER"), part(bytes(1 << 15)), 2000)
    assert ask(plugin.address, "status", {"a": 1}, engine="SGLang") == {"a": 1}
    receiver = WeightReceiver(publisher.address, handshake=HANDSHAKE)
    publisher.publish(1, {"w": torch.ones(2)})
    wait(lambda: (latest := receiver.latest()) is not None and latest[0] == 1)
    for each in (receiver, publisher, plugin):
        each.close()


def test_a_learner_that_never_ends_its_weights_is_left_and_the_next_one_heard() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.settimeout(10)
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        receiver = WeightReceiver(address, handshake=HANDSHAKE, limits=Limits(max_bytes=MIB))
        raw, _ = listener.accept()
        raw.settimeout(10)
        shake_hands(raw, b"ROUTER")
        assert not sends(raw, part(bytes(MIB // 8)), 500)
    publisher = WeightPublisher(address, handshake=HANDSHAKE)
    publisher.publish(1, {"w": torch.ones(2)})
    wait(lambda: (latest := receiver.latest()) is not None and latest[0] == 1)
    receiver.close()
    publisher.close()


def test_of_many_unfinished_messages_the_largest_goes(collector: ZMQCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_LEAST_TOTAL", MIB)
    socket_ = open_socket(zmq.PULL)
    address = bind(socket_, LOCAL, limits=Limits(max_bytes=MIB))
    half, largest, small = (peer(address, b"PUSH") for _ in range(3))
    for raw, size in ((half, MIB // 2), (largest, MIB // 2 + 1000), (small, 1000)):
        with contextlib.suppress(OSError):
            raw.sendall(part(bytes(size)))
        time.sleep(0.05)
    for raw in (half, small):
        raw.sendall(part(b"end", more=False))
    arrived = [socket_.recv_multipart() for _ in range(2) if socket_.poll(5000)]
    assert sorted(len(frames[0]) for frames in arrived) == [1000, MIB // 2]
    assert not sends(largest, part(bytes(1000)), 1000)
    for raw in (half, small):
        raw.close()
    socket_.close()


def test_no_more_connections_than_are_looked_after(collector: ZMQCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_MAX_CONNECTIONS", 1)
    first = peer(collector.address, b"PUSH")
    first.sendall(part(b"x", more=False))
    wait(lambda: collector.poll(0.05) or collector.rejected)
    host, port = collector.address.removeprefix("tcp://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as second:
        assert second.recv(1) == b""  # closed before ZeroMQ greets
    first.close()
    assert receives(collector)


def test_the_path_to_the_socket_itself_is_this_users_alone_and_goes_with_it() -> None:
    socket_ = open_socket(zmq.PULL)
    bind(socket_, LOCAL)
    folder = os.path.dirname(socket_.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("ipc://"))
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    socket_.close()
    assert not os.path.exists(folder)


def frames_of(message: list[bytes]) -> bytes:
    return b"".join(part(bytes(each), more=i < len(message) - 1) for i, each in enumerate(message))


@pytest.mark.parametrize("step", [1, 7, 1 << 16])
def test_the_meter_follows_frames_however_the_bytes_are_cut(step: int) -> None:
    message = frames_of(encode("kind", {"a": 1}, {"w": torch.arange(4), "empty": torch.zeros(0)}))
    short = b"\x01\x03abc" + b"\x00\x00"  # small frames; the last one is empty
    stream = GREETING + message * 3 + PING + short + b"\x01\x05hello" + PING
    meter = Meter(Limits(max_bytes=len(message), max_leaves=2))
    for at in range(0, len(stream), step):
        meter.feed(memoryview(stream)[at : at + step])
    assert meter.held == 5


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (b"\xff" + bytes(8) + b"\x7f\x01" + bytes(53), "does not speak ZMTP 3"),
        (b"\x01\x00" + bytes(62), "does not speak ZMTP 3"),
        (GREETING + b"\x05\x00", "command of 0 bytes with flags 5"),
        (GREETING + b"\x06" + struct.pack(">Q", (1 << 16) + 1), "command of 65537 bytes"),
        (GREETING + b"\x03" + struct.pack(">Q", 101), "more than the 100 bytes or 64 parts"),
        (GREETING + b"\x01\x33" + bytes(51) + b"\x00\x32", "more than the 100 bytes"),
        (GREETING + b"\x01\x00" * 65, "or 64 parts"),
    ],
)
def test_what_the_meter_refuses(stream: bytes, says: str) -> None:
    with pytest.raises(TooLongError, match=says):
        Meter(Limits(max_bytes=100, max_leaves=0)).feed(memoryview(stream))
