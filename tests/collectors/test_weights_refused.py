"""Weights that an engine must not load: refused as they arrive, reported back, and what serves stays."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from weight_ends import HANDSHAKE, FakeLearner, engine, load, take, weights

from aurora_rl.collectors.codec import checksum, encode

pytestmark = pytest.mark.usefixtures("quick_heartbeats")


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
