"""Versioned weights: every order of starts and restarts, latest wins, and everything acknowledged."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import zmq
from processes import wait
from weight_ends import HANDSHAKE, LOCAL, FakeLearner, engine, free_address, load, take, weights

from aurora_rl.collectors.codec import CodecError, Limits, checksum, decode, encode
from aurora_rl.collectors.weights import WeightPublisher

pytestmark = pytest.mark.usefixtures("quick_heartbeats")


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


def test_an_engine_composes_nothing_while_no_learner_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[str] = []

    def counted(kind: str, *parts: Any) -> list[Any]:
        composed.append(kind)
        return encode(kind, *parts)

    monkeypatch.setattr("aurora_rl.collectors.weights.encode", counted)
    address = free_address()
    receiver = engine(address)
    time.sleep(0.3)
    assert composed == []
    publisher = WeightPublisher(address, handshake=HANDSHAKE)
    wait(lambda: "serving" in composed)
    wait(lambda: publisher.engines)
    receiver.close()
    publisher.close()


def test_the_learner_hears_why_a_version_was_rolled_back() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    receiver = engine(publisher.address)
    publisher.publish(3, weights(1.0))
    version, _ = take(receiver)
    assert publisher.rejected_by(3) == {}
    receiver.reject(version, "rolled back")
    wait(lambda: publisher.rejected_by(3))
    assert publisher.rejected_by(3) == {"engine": "rolled back"} and publisher.rejected_by(2) == {}
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
    wait(lambda: "engine" in second.engines)
    assert second.engines["engine"].serving == 1 and second.next_version == 2
    second.publish(second.next_version, weights(2.0))
    assert load(receiver) == 2 and second.wait_ack(2, 10)
    second.close()
    receiver.close()


def test_a_learner_that_starts_counting_afresh_is_warned(caplog: pytest.LogCaptureFixture) -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    receiver = engine(publisher.address, version=7)
    wait(lambda: publisher.engines)
    publisher.publish(1, weights(1.0))
    wait(lambda: publisher.engines["engine"].ahead)
    assert "publish next_version to reach it" in caplog.text
    publisher.publish(publisher.next_version, weights(2.0))
    assert load(receiver) == 8
    wait(lambda: not publisher.engines["engine"].ahead)
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
    wait(lambda: publisher.engines and publisher.engines["engine"].offered == 19)
    wait(lambda: not publisher.engines["engine"].in_flight)
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


def test_weights_for_one_engine_reach_no_other() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    first, second = (engine(publisher.address, name=name) for name in ("one", "other"))
    publisher.publish(1, weights(1.0))
    assert load(first) == load(second) == 1
    publisher.publish(2, weights(2.0), ["one"])
    assert load(first) == 2 and publisher.wait_ack(2, 10)
    late = engine(publisher.address, name="late")
    assert load(late) == 1 and second.latest() is None and not publisher.overtaken
    publisher.publish(3, weights(3.0))
    assert {load(each) for each in (first, second, late)} == {3}
    for receiver in (first, second, late):
        receiver.close()
    publisher.close()


def test_handshake_mismatch_is_one_sentence_on_both_sides_and_heals() -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    publisher.publish(1, weights(1.0))
    receiver = engine(publisher.address, handshake=replace(HANDSHAKE, head_checksum="other"))
    wait(lambda: receiver.error)
    cure = "set the same model and dtype on both sides"
    mismatch = f"handshake mismatch: head_checksum is 'head' at the learner and 'other' at the engine; {cure}"
    assert publisher.error == mismatch
    told = f"handshake mismatch: head_checksum differs from the learner's, whose log has both values; {cure}"
    assert receiver.error == told
    assert receiver.latest() is None and publisher.engines == {}
    address = publisher.address
    publisher.close()
    right = WeightPublisher(address, handshake=replace(HANDSHAKE, head_checksum="other"))
    wait(lambda: receiver.error is None)  # accepted, even before there are weights
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
    wait(lambda: publisher.engines["engine"].last_seen > seen + 0.1)
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
    wait(lambda: publisher.engines and publisher.engines["engine"].rejected)
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
    wait(lambda: publisher.rejected == len(bad))
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
    wait(lambda: publisher.rejected == 2)
    assert publisher.next_version == 2
    dealer.close(0)
    context.term()
    publisher.close()


def test_a_learner_that_is_silent_is_told_once_and_again_when_it_answers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aurora_rl.collectors.weights._SILENCE_S", 0.3)
    learner = FakeLearner()
    receiver = engine(learner.address, version=3)
    time.sleep(0.5)
    assert not caplog.records  # who was never heard is not missed
    identity, _ = learner.receive("serving")
    for text in ("the learner has not answered for 0 s; serving goes on with version 3", "the learner answers again, "):
        learner.socket.send_multipart([identity, *encode("accepted")])
        wait(lambda text=text: any(record.message.startswith(text) for record in caplog.records))
    assert len(caplog.records) == 2
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
    with pytest.raises(ValueError, match="version 2 is not newer than the published 2; publish a larger one"):
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


def test_a_new_learner_gives_no_number_that_weights_on_trial_have() -> None:
    address = free_address()
    first = WeightPublisher(address, handshake=HANDSHAKE)
    receiver = engine(address)
    first.publish(5, weights(5.0))
    version, on_trial = take(receiver)
    first.close()
    second = WeightPublisher(address, handshake=HANDSHAKE)
    second.publish(2, weights(9.0))
    wait(lambda: second.overtaken)
    assert second.rejected_by(2) == {} and receiver.latest() is None
    assert second.next_version == 6
    receiver.acknowledge(version, checksum(on_trial), swap_ms=1.0)
    second.publish(second.next_version, weights(9.0))
    version, tensors = take(receiver)
    assert version == 6 and (tensors["layer", "w"] == 9).all() and not second.overtaken
    receiver.close()
    second.close()
