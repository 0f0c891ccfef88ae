"""Versioned weights: every order of starts and restarts, latest wins, and everything acknowledged."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
import zmq
from processes import wait as until
from tensordict import TensorDict

from aurora_rl.collectors.codec import CodecError, Limits, checksum, decode, encode
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.sockets import bind, open_socket
from aurora_rl.collectors.weights import WeightPublisher, WeightReceiver

HANDSHAKE = Handshake(1, "config", "head", (2, 5), "", "eagle3")
LOCAL = "tcp://127.0.0.1:*"


def weights(value: float) -> TensorDict:
    return TensorDict({"layer": {"w": torch.full((2, 3), value)}}, batch_size=[])


def engine(address: str, **options: object) -> WeightReceiver:
    return WeightReceiver(address, **{"handshake": HANDSHAKE, "heartbeat_s": 0.05, "name": "engine", **options})


def take(receiver: WeightReceiver) -> tuple[int, TensorDict]:
    got: list[tuple[int, TensorDict]] = []

    def arrived() -> bool:
        latest = receiver.latest()
        got.extend([latest] if latest else [])
        return bool(got)

    until(arrived)
    return got[0]


def load(receiver: WeightReceiver) -> int:
    version, tensors = take(receiver)
    receiver.acknowledge(version, checksum(tensors), swap_ms=1.5)
    return version


def free_address() -> str:
    socket = open_socket(zmq.ROUTER)
    address = bind(socket, LOCAL)
    socket.close()
    return address


class FakeLearner:
    """A bare ROUTER, to send what a `WeightPublisher` would not."""

    def __init__(self) -> None:
        self.socket = open_socket(zmq.ROUTER)
        self.address = bind(self.socket, LOCAL)

    def receive(self, kind: str) -> tuple[bytes, dict]:
        deadline = time.monotonic() + 5  # other messages, heartbeats among them, do not prolong it
        while time.monotonic() < deadline:
            if self.socket.poll(100):
                identity, *frames = self.socket.recv_multipart()
                message = decode(frames)
                if message.kind == kind:
                    return identity, message.meta
        raise AssertionError("timed out")

    def send(self, identity: bytes, version: int) -> None:
        tensors = weights(float(version))
        meta = {"version": version, "checksum": checksum(tensors), "identity": HANDSHAKE.identity}
        self.socket.send_multipart([identity, *encode("weights", meta, tensors)])

    def await_received(self, version: int) -> None:
        """Until the engine says that these weights have arrived."""
        until(lambda: self.receive("serving")[1]["received"] == version)

    def close(self) -> None:
        self.socket.close()


def test_publish_load_acknowledge() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    receiver = engine(publisher.address)
    source = weights(1.0)
    published = publisher.publish(3, source)
    source["layer", "w"].zero_()  # training goes on at once
    version, tensors = take(receiver)
    assert version == 3 and (tensors["layer", "w"] == 1.0).all()
    assert checksum(tensors) == published
    assert receiver.version == 0 and not publisher.wait_ack(3, 0.01)
    receiver.acknowledge(version, checksum(tensors), swap_ms=2.5)
    assert receiver.version == 3 and publisher.wait_ack(3, 10)
    status = publisher.engines["engine"]
    assert (status.serving, status.acknowledged, status.swap_ms, status.rejected) == (3, 3, 2.5, None)
    assert receiver.latest() is None
    assert publisher.next_version == 4
    receiver.close()
    publisher.close()


def test_the_learner_hears_why_a_version_was_rolled_back() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    receiver = engine(publisher.address)
    publisher.publish(3, weights(1.0))
    version, _ = take(receiver)
    assert publisher.rejection(3) is None
    receiver.reject(version, "rolled back")
    until(lambda: publisher.rejection(3))
    assert publisher.rejection(3) == "rolled back" and publisher.rejection(2) is None
    receiver.close()
    publisher.close()


def test_engine_first_then_learner_then_a_restarted_learner() -> None:
    address = free_address()
    receiver = engine(address)
    assert receiver.latest() is None
    first = WeightPublisher(address, handshake=HANDSHAKE)
    first.publish(1, weights(1.0))
    assert load(receiver) == 1 and first.wait_ack(1, 10)
    first.close()

    second = WeightPublisher(address, handshake=HANDSHAKE)
    until(lambda: "engine" in second.engines)
    assert second.engines["engine"].serving == 1 and second.next_version == 2
    second.publish(second.next_version, weights(2.0))
    assert load(receiver) == 2 and second.wait_ack(2, 10)
    second.close()
    receiver.close()


def test_a_learner_that_starts_counting_afresh_is_warned(caplog: pytest.LogCaptureFixture) -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    receiver = engine(publisher.address, version=7)
    until(lambda: publisher.engines)
    publisher.publish(1, weights(1.0))
    until(lambda: publisher.engines["engine"].ahead)
    assert "publish next_version to reach it" in caplog.text
    publisher.publish(publisher.next_version, weights(2.0))
    assert load(receiver) == 8
    until(lambda: not publisher.engines["engine"].ahead)
    receiver.close()
    publisher.close()


def test_a_restarted_engine_gets_the_newest_again() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    publisher.publish(1, weights(1.0))
    first = engine(publisher.address)
    assert load(first) == 1
    first.close()
    publisher.publish(2, weights(2.0))
    publisher.publish(3, weights(3.0))
    second = engine(publisher.address)
    assert load(second) == 3 and publisher.wait_ack(3, 10)
    second.close()
    publisher.close()


def test_latest_wins_while_the_engine_does_not_look() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    receiver = engine(publisher.address)
    for version in range(1, 20):
        publisher.publish(version, weights(float(version)))
    until(lambda: publisher.engines and publisher.engines["engine"].offered == 19)
    until(lambda: not publisher.engines["engine"].in_flight)
    version, tensors = take(receiver)
    assert version == 19 and (tensors["layer", "w"] == 19).all()
    assert receiver.latest() is None
    receiver.close()
    publisher.close()


def test_one_offer_at_a_time() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(publisher.address)
    serving = {"engine": "slow", "version": 0, "checksum": None, "received": None, "handshake": HANDSHAKE.to_meta()}

    def hear() -> list[tuple[str, object]]:
        heard = []
        while dealer.poll(300):
            message = decode(dealer.recv_multipart())
            heard.append((message.kind, message.meta.get("version")))
        return heard

    publisher.publish(1, weights(1.0))
    dealer.send_multipart(encode("serving", serving))
    assert hear() == [("accepted", None), ("weights", 1)]
    publisher.publish(2, weights(2.0))
    publisher.publish(3, weights(3.0))
    dealer.send_multipart(encode("serving", serving))
    assert hear() == [("accepted", None)]  # version 1 has not arrived yet, so it says
    dealer.send_multipart(encode("serving", {**serving, "received": 1}))
    assert hear() == [("accepted", None), ("weights", 3)]
    dealer.close(0)
    context.term()
    publisher.close()


def test_several_engines() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    engines = [engine(publisher.address, name=f"engine {i}") for i in range(3)]
    publisher.publish(1, weights(1.0))
    for receiver in engines[:2]:
        load(receiver)
    assert publisher.wait_ack(1, 10, engines=2) and not publisher.wait_ack(1, 0.05, engines=3)
    load(engines[2])
    assert publisher.wait_ack(1, 10, engines=3)
    for receiver in engines:
        receiver.close()
    publisher.close()


def test_handshake_mismatch_is_one_sentence_on_both_sides_and_heals() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    publisher.publish(1, weights(1.0))
    receiver = engine(publisher.address, handshake=replace(HANDSHAKE, head_checksum="other"))
    until(lambda: receiver.error)
    cure = "set the same model and dtype on both sides"
    mismatch = f"handshake mismatch: head_checksum is 'head' at the learner and 'other' at the engine; {cure}"
    assert publisher.error == mismatch
    told = f"handshake mismatch: head_checksum differs from the learner's, whose log has both values; {cure}"
    assert receiver.error == told
    assert receiver.latest() is None and publisher.engines == {}
    address = publisher.address
    publisher.close()
    right = WeightPublisher(address, handshake=replace(HANDSHAKE, head_checksum="other"))
    until(lambda: receiver.error is None)  # accepted, even before there are weights
    right.publish(1, weights(1.0))
    assert load(receiver) == 1
    receiver.close()
    right.close()


def test_nack_is_reported_and_not_offered_again() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    receiver = engine(publisher.address)
    publisher.publish(1, weights(1.0))
    version, _ = take(receiver)
    receiver.reject(version, "shapes differ")
    start = time.monotonic()
    assert not publisher.wait_ack(1, 10)
    assert time.monotonic() - start < 5  # a rejection ends the wait
    assert publisher.engines["engine"].rejected == (1, "shapes differ")
    seen = publisher.engines["engine"].last_seen
    until(lambda: publisher.engines["engine"].last_seen > seen + 0.1)
    assert receiver.latest() is None and receiver.version == 0
    publisher.publish(2, weights(2.0))
    assert load(receiver) == 2 and publisher.wait_ack(2, 10)
    receiver.close()
    publisher.close()


def test_a_swap_that_did_nothing_is_found() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    receiver = engine(publisher.address)
    publisher.publish(1, weights(1.0))
    version, _ = take(receiver)
    receiver.acknowledge(version, checksum(weights(0.0)), swap_ms=0.1)
    assert not publisher.wait_ack(1, 10)
    rejected = publisher.engines["engine"].rejected
    assert rejected is not None and rejected[0] == 1 and "the loaded weights have checksum" in rejected[1]
    receiver.close()
    publisher.close()


def test_corrupted_weights_are_rejected_by_the_receiver() -> None:
    learner = FakeLearner()
    receiver = engine(learner.address)
    identity, _ = learner.receive("serving")
    meta = {"version": 1, "checksum": "0" * 32, "identity": HANDSHAKE.identity}
    learner.socket.send_multipart([identity, *encode("weights", meta, weights(1.0))])
    nack = learner.receive("nack")[1]
    assert nack["version"] == 1 and "declared 00000" in nack["reason"]
    learner.socket.send_multipart([identity, b"garbage"])
    assert learner.receive("nack")[1]["version"] is None
    learner.socket.send_multipart([identity, *encode("weights", {"version": True, "checksum": ""})])
    assert "field version is not a int" in learner.receive("nack")[1]["reason"]
    assert receiver.latest() is None and receiver.rejected == 3
    receiver.close()
    learner.close()


def test_weights_older_than_those_served_are_ignored() -> None:
    learner = FakeLearner()
    receiver = engine(learner.address, version=2)
    identity, _ = learner.receive("serving")
    for version in (1, 2):  # replayed: older than what is served, and that itself
        learner.send(identity, version)
        learner.await_received(version)
        assert receiver.latest() is None
    learner.send(identity, 5)
    learner.await_received(5)
    learner.send(identity, 7)  # a newer one takes the place of a waiting one
    learner.await_received(7)
    version, tensors = take(receiver)
    assert version == 7 and (tensors["layer", "w"] == 7).all() and receiver.latest() is None
    receiver.close()
    learner.close()


def test_weights_older_than_those_that_wait_are_ignored() -> None:
    learner = FakeLearner()
    receiver = engine(learner.address, version=3)
    identity, _ = learner.receive("serving")
    for version in (7, 5):
        learner.send(identity, version)
        learner.await_received(version)
    version, tensors = take(receiver)
    assert version == 7 and (tensors["layer", "w"] == 7).all() and receiver.latest() is None
    receiver.close()
    learner.close()


def test_an_unreadable_offer_does_not_block_later_ones() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    receiver = engine(publisher.address, limits=Limits(max_leaves=1))
    publisher.publish(1, {"a": torch.ones(1), "b": torch.ones(1)})
    until(lambda: publisher.engines and publisher.engines["engine"].rejected)
    rejected = publisher.engines["engine"].rejected
    assert rejected is not None and rejected[0] is None and "1 to 2 frames" in rejected[1]
    publisher.publish(2, {"a": torch.ones(1)})
    assert load(receiver) == 2
    receiver.close()
    publisher.close()


def test_hostile_messages_do_not_end_the_publisher() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(publisher.address)
    ack = {"engine": "x", "version": 1, "checksum": "", "swap_ms": 1.0}
    bad = [
        [b""],
        [b"\xff"],
        encode("serving", {}),
        encode("serving", {"engine": "x", "handshake": {}}),
        encode("serving", {"engine": "x", "handshake": HANDSHAKE.to_meta(), "version": "1"}),
        encode("ack", {**ack, "version": None}),
        encode("ack", {**ack, "swap_ms": 10**400}),
        encode("nack", {**ack, "reason": 3}),
        encode("other", ack),
        encode("weights", {}, weights(1.0)),
    ]
    for frames in bad:
        dealer.send_multipart(frames)
    dealer.send_multipart(encode("ack", ack))  # well formed, but from nobody we know: ignored
    until(lambda: publisher.rejected == len(bad))
    assert publisher.engines == {}
    receiver = engine(publisher.address)
    publisher.publish(1, weights(1.0))
    assert load(receiver) == 1
    receiver.close()
    dealer.close(0)
    context.term()
    publisher.close()


def test_a_connection_is_one_engine_however_many_names_it_claims() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    publisher.publish(1, weights(1.0))
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(publisher.address)
    for number in range(300):
        dealer.send_multipart(encode("serving", serving(engine=f"{number}")))
    kinds = [decode(dealer.recv_multipart()).kind for _ in range(301) if dealer.poll(5000)]
    assert kinds.count("accepted") == 300 and kinds.count("weights") == 1
    assert list(publisher.engines) == ["299"]
    dealer.close(0)
    context.term()
    publisher.close()


@pytest.mark.parametrize("version", [2**63 - 1, 2**32 + 2, -1])
def test_a_version_that_nobody_can_have_published_is_not_believed(version: int) -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    publisher.publish(1, weights(1.0))
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(publisher.address)
    dealer.send_multipart(encode("serving", serving()))
    dealer.send_multipart(encode("ack", {"engine": "x", "version": version, "checksum": "", "swap_ms": 1.0}))
    dealer.send_multipart(encode("serving", serving(version=version)))
    until(lambda: publisher.rejected == 2)
    assert publisher.next_version == 2
    dealer.close(0)
    context.term()
    publisher.close()


@pytest.mark.parametrize(
    ("version", "value", "says"),
    [
        (1, math.nan, "tensor 'layer.w' has 6 values that are infinite or not a number"),
        (1, 3e37, "tensor 'layer.w' has 6 values beyond 1e"),
        (2**53, 1.0, "version 9007199254740992 leaves no room for later ones"),
    ],
)
def test_weights_that_must_not_serve_are_refused_as_they_arrive(version: int, value: float, says: str) -> None:
    learner = FakeLearner()
    receiver = engine(learner.address)
    identity, _ = learner.receive("serving")
    tensors = weights(value)
    meta = {"version": version, "checksum": checksum(tensors), "identity": HANDSHAKE.identity}
    learner.socket.send_multipart([identity, *encode("weights", meta, tensors)])
    assert says in learner.receive("nack")[1]["reason"]
    assert receiver.latest() is None and receiver.version == 0
    learner.send(identity, 2)
    assert load(receiver) == 2
    receiver.close()
    learner.close()


@pytest.mark.parametrize("field", ["target", "head_checksum", "drafter", None])
def test_weights_of_another_model_are_refused_although_they_fit(field: str | None) -> None:
    """As of a learner that takes every engine for its own; None is one that says no identity."""
    learner = FakeLearner()
    receiver = engine(learner.address)
    identity, _ = learner.receive("serving")
    learner.send(identity, 1)
    assert load(receiver) == 1
    tensors = weights(2.0)
    stated = {} if field is None else {"identity": replace(HANDSHAKE, **{field: "another"}).identity}
    meta = {"version": 2, "checksum": checksum(tensors), **stated}
    learner.socket.send_multipart([identity, *encode("weights", meta, tensors)])
    nack = learner.receive("nack")[1]
    assert nack["version"] == 2
    assert nack["reason"].startswith("weights of another target or drafter: their identity is ")
    assert nack["reason"].endswith("; start learner and engine with the same model, dtype and drafter")
    assert receiver.latest() is None and receiver.version == 1
    learner.send(identity, 3)
    assert load(receiver) == 3
    receiver.close()
    learner.close()


def test_a_learner_hears_which_weights_an_engine_serves() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    silent, receiver = engine(publisher.address), engine(publisher.address, name="second", version=4, checksum="abc")
    deadline = time.monotonic() + 5
    while len(publisher.engines) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert publisher.served == [("second", 4, "abc")]  # the other says no checksum
    for each in (silent, receiver, publisher):
        each.close()


def serving(**fields: object) -> dict[str, object]:
    """What an engine says of itself."""
    return {"engine": "x", "version": 0, "checksum": None, "received": None, "handshake": HANDSHAKE.to_meta()} | fields


def test_errors_of_the_caller() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE, limits=Limits(max_bytes=1000))
    with pytest.raises(OSError, match=f"{publisher.address} is in use; stop the process"):
        WeightPublisher(publisher.address, handshake=HANDSHAKE)
    publisher.publish(2, weights(1.0))
    with pytest.raises(ValueError, match="version 2 is not newer than the published 2"):
        publisher.publish(2, weights(1.0))
    with pytest.raises(ValueError, match="exceed the 1000 bytes"):
        publisher.publish(3, {"a": torch.zeros(1000)})
    with pytest.raises(CodecError, match="dtype torch.complex64"):
        publisher.publish(3, {"a": torch.zeros(1, dtype=torch.complex64)})
    publisher.close()


def test_close_is_bounded_and_idempotent() -> None:
    receiver = engine(free_address())
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    publisher.publish(1, weights(1.0))
    receiver.acknowledge(1, "", 0.0)  # an answer nobody will hear
    start = time.monotonic()
    for closable in (receiver, publisher, receiver, publisher):
        closable.close(0.5)
    assert time.monotonic() - start < 3
