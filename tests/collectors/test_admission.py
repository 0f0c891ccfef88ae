"""CurveZMQ on real sockets: known peers are served, all others are refused, counted, and logged at a bounded rate."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
import zmq
from processes import wait
from tensordict import TensorDict

from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import (
    ClientKeys,
    engine_keys,
    learner_keys,
    make_keys,
    plugin_client_keys,
    plugin_server_keys,
)
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.weights import WeightPublisher, WeightReceiver
from aurora_rl.envs.remote.plugin_server import PluginError, PluginServer, ask

HANDSHAKE = Handshake(1, "config", "head", (2, 5), "", "eagle3")
LOCAL = "tcp://127.0.0.1:*"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder)
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> ClientKeys:
    """An engine that knows the learner's public key, which does not know its."""
    keys = tmp_path_factory.mktemp("stranger")
    make_keys(keys, "stranger")
    shutil.copy(folder / "learner.key", keys / "learner.key")
    return engine_keys(keys)


@pytest.fixture
def collector(folder: Path) -> Iterator[ZMQCollector]:
    collector = ZMQCollector(LOCAL, handshake=HANDSHAKE, keys=learner_keys(folder))
    yield collector
    collector.shutdown()


def arrives(collector: ZMQCollector, keys: ClientKeys | None, seconds: float = 5.0) -> bool:
    with closing(TrajectorySink(collector.address, handshake=HANDSHAKE, keys=keys)) as sink:
        sink.extend(TensorDict({"x": torch.arange(200_000)}, batch_size=[]))
        return len(collector.poll(seconds)) == 1


def test_a_known_engine_is_heard_and_no_other(
    collector: ZMQCollector, folder: Path, stranger: ClientKeys, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not arrives(collector, stranger, 0.5) and not arrives(collector, stranger, 0.5)
        wait(lambda: collector.refused >= 2)
    (line,) = caplog.messages
    assert "a peer from 127.0.0.1:" in line and f"{stranger.public.decode()} is not in {folder}/engines" in line
    assert not arrives(collector, None, 0.5)  # without keys
    with closing(TrajectorySink(collector.address, handshake=HANDSHAKE, keys=engine_keys(folder), name="x")) as sink:
        sink.extend(TensorDict({"x": torch.arange(200_000)}, batch_size=[]))
        (trajectory,) = collector.poll(5.0)
    assert trajectory["source"] == "engine"  # by its key, whatever it calls itself


def test_an_engine_pins_the_learner(folder: Path, tmp_path: Path) -> None:
    make_keys(tmp_path)
    shutil.copy(folder / "engines/engine.key", tmp_path / "engines/engine.key")
    impostor = ZMQCollector(LOCAL, handshake=HANDSHAKE, keys=learner_keys(tmp_path))  # it would admit the engine
    assert not arrives(impostor, engine_keys(folder), 0.5)
    wait(lambda: impostor.refused)
    impostor.shutdown()
    plain = ZMQCollector(LOCAL, handshake=HANDSHAKE)
    assert not arrives(plain, engine_keys(folder), 0.5)
    plain.shutdown()


@pytest.mark.usefixtures("quick_heartbeats")
def test_weights_go_to_known_engines_and_a_refused_one_is_told(
    folder: Path, stranger: ClientKeys, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE, keys=learner_keys(folder))
    publisher.publish(1, {"w": torch.ones(300_000)})
    refused = WeightReceiver(publisher.address, handshake=HANDSHAKE, keys=stranger)
    known = WeightReceiver(publisher.address, handshake=HANDSHAKE, keys=engine_keys(folder), name="x")
    got: list[tuple[int, TensorDict]] = []
    wait(lambda: got.extend(filter(None, [known.latest()])) or got)
    known.acknowledge(1, checksum(got[0][1]), 0.1)
    assert publisher.wait_ack(1, 10) and known.error is None
    wait(lambda: refused.error)
    assert refused.error == (
        "the learner does not know the key of this engine; copy engines/stranger.key to the folder of its wire.keys"
    )
    assert publisher.refused and refused.latest() is None
    assert list(publisher.engines) == ["engine"]  # by its key, whatever it calls itself
    for each in (refused, known, publisher):
        each.close()


def test_the_control_socket_answers_the_engines_own_key_alone(folder: Path, tmp_path: Path) -> None:
    server = PluginServer(LOCAL, lambda kind, fields: {"kind": kind}, keys=plugin_server_keys(folder))
    try:
        assert ask(server.address, "status", engine="SGLang", keys=plugin_client_keys(folder)) == {"kind": "status"}
        make_keys(tmp_path)
        stranger = plugin_client_keys(tmp_path)
        pinned = ClientKeys(stranger.name, stranger.public, stranger.secret, engine_keys(folder).public)
        for keys in (None, pinned):
            with pytest.raises(PluginError, match="no answer at .* wire.keys here, AURORA_RL_SGLANG_KEYS there"):
                ask(server.address, "status", engine="SGLang", keys=keys, timeout=0.5)
    finally:
        server.close()


def test_nobody_is_let_in_while_nobody_answers_for_admission(collector: ZMQCollector, folder: Path) -> None:
    admission = collector._socket.admission
    assert admission is not None
    admission.close()
    collector._socket.admission = None
    assert not arrives(collector, engine_keys(folder), 0.5)


def test_a_peer_that_goes_past_the_relay_needs_a_key_as_well(collector: ZMQCollector, folder: Path) -> None:
    inside = collector._socket.getsockopt_string(zmq.LAST_ENDPOINT)
    assert inside.startswith("tcp://127.0.0.1:") and inside != collector.address
    with closing(TrajectorySink(inside, handshake=HANDSHAKE)) as sink:
        sink.extend(TensorDict({"x": torch.arange(3)}, batch_size=[]))
        assert collector.poll(0.5) == []
