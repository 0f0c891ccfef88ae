"""The TorchRL scheme: sender and receiver through TorchRL's own calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.weight_update import WeightSyncScheme

from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.weight_scheme import ZMQWeightSyncScheme

HANDSHAKE = Handshake(1, "config", "head", (2, 5), "", "eagle3")


class Learner:
    """A context that is no collector: TorchRL resolves the model by its name."""

    def __init__(self) -> None:
        self.policy = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 2)})


@pytest.fixture
def pair() -> Iterator[tuple[ZMQWeightSyncScheme, Learner]]:
    learner = Learner()
    scheme = ZMQWeightSyncScheme("tcp://127.0.0.1:*", handshake=HANDSHAKE, key_filter=lambda key: key[0] != "embed")
    scheme.init_on_sender(model_id="policy", context=learner)
    scheme.connect()
    yield scheme, learner
    scheme.shutdown()
    scheme.shutdown()


def receiver_of(scheme: ZMQWeightSyncScheme, model: nn.Module) -> ZMQWeightSyncScheme:
    assert scheme.publisher is not None
    receiver = WeightSyncScheme.from_backend("zmq", address=scheme.publisher.address, handshake=HANDSHAKE)
    receiver.init_on_receiver(model_id="policy", model=model)
    receiver.connect()
    return receiver


def test_zeroed_weights_arrive_as_zeros_and_filtered_ones_stay(
    pair: tuple[ZMQWeightSyncScheme, Learner],
) -> None:
    sender, learner = pair
    model = Learner().policy
    embedding = model["embed"].weight.clone()
    receiver = receiver_of(sender, model)
    for parameter in learner.policy.parameters():
        parameter.data.zero_()
    sender.send()
    assert receiver.receive(timeout=10) is not None
    assert not model["head"].weight.any() and not model["head"].bias.any()
    assert torch.equal(model["embed"].weight, embedding)
    assert sender.publisher.wait_ack(1, 10)
    (status,) = sender.publisher.engines.values()
    assert (status.serving, status.acknowledged, status.rejected) == (1, 1, None)
    assert status.swap_ms is not None and status.swap_ms > 0
    assert receiver.receive(timeout=0.01) is None
    receiver.shutdown()


def test_modules_tensordicts_and_state_dicts_can_be_sent(pair: tuple[ZMQWeightSyncScheme, Learner]) -> None:
    sender, learner = pair
    model = Learner().policy
    receiver = receiver_of(sender, model)
    for weights in (Learner().policy, TensorDict.from_module(Learner().policy), Learner().policy.state_dict()):
        sender.send(weights)
        received = receiver.receive(timeout=10)
        assert received is not None
        assert checksum(received["head"]) == checksum(TensorDict.from_module(model["head"]))
    receiver.shutdown()


def test_weights_that_do_not_fit_are_rejected_and_nothing_changes(
    pair: tuple[ZMQWeightSyncScheme, Learner], caplog: pytest.LogCaptureFixture
) -> None:
    sender, _ = pair
    model = nn.ModuleDict({"other": nn.Linear(3, 2)})
    before = checksum(TensorDict.from_module(model))
    receiver = receiver_of(sender, model)
    sender.send()
    assert receiver.receive(timeout=10) is None
    assert not sender.publisher.wait_ack(1, 10)
    (status,) = sender.publisher.engines.values()
    assert status.rejected == (1, "KeyError while loading") and status.serving == 0
    assert checksum(TensorDict.from_module(model)) == before
    assert "version 1 is not installed" in caplog.text
    receiver.shutdown()


def test_nothing_to_publish_is_an_error() -> None:
    scheme = ZMQWeightSyncScheme("tcp://127.0.0.1:*", handshake=HANDSHAKE)
    scheme.init_on_sender(model_id="policy")
    scheme.connect()
    with pytest.raises(ValueError, match="no weights to publish"):
        scheme.send()
    scheme.shutdown()


def test_a_transport_needs_a_side() -> None:
    with pytest.raises(RuntimeError, match="call init_on_sender or init_on_receiver first"):
        ZMQWeightSyncScheme("tcp://127.0.0.1:*", handshake=HANDSHAKE).create_transport()
