"""A learner of adapters: what its traffic teaches, what it publishes, and what it resumes from."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from benchmark_scripts import imported
from learner_loops import SHAPE, Make, drain, send, step_until
from processes import wait
from tensordict import TensorDict

from aurora_rl.policies.adapters import adapted_layers
from aurora_rl.policies.formats.peft import adapter_ranks
from aurora_rl.storage import CheckpointError
from aurora_rl.training.gate import replay
from aurora_rl.training.served_weights import with_weights

TENANTS = ("acme", "globex")


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> list[TensorDict]:
    """Two tenants' requests in turns, each of whom continues the same prompts by a rule of its own."""
    return imported("adapters", monkeypatch).contrary(24)


def lengths(loop: SimpleNamespace) -> list[float]:
    """How far the adapters that are published are from the shared drafter."""
    return [
        sum(float(tensor[place].norm()) for name, tensor in loop.learner._serving.items() if name.endswith("lora_B"))
        for place in range(len(TENANTS))
    ]


def test_adapters_are_learned_gated_published_and_saved_as_weights_are(make: Make, stream: list[TensorDict]) -> None:
    first = make(adapters=TENANTS, batch_size=2, gate=2, publish_every=4, replay=2)
    send(first, stream[0:8:2])  # of acme alone
    step_until(first, lambda: first.events("candidate"))
    send(first, stream[8:12:2])
    step_until(first, lambda: first.learner.version == 1)
    of_acme = lengths(first)
    assert of_acme[0] > 0 and of_acme[1] == 0, "an adapter without traffic stays the shared drafter"
    first.learner._publish_every = 10_000
    wait(lambda: first.receiver.latest() is not None)
    send(first, stream[12:18])
    drain(first)
    first.learner.save()
    published = first.learner._serving
    assert adapter_ranks(first.states.parent / "versions" / "1") == dict.fromkeys(TENANTS, 2)

    second = make(adapters=TENANTS)
    second.learner.resume(first.states)
    assert all(torch.equal(tensor, published[name]) for name, tensor in second.learner._serving.items())
    learned = first.drafter.state_dict()
    assert all(torch.equal(tensor, learned[name]) for name, tensor in second.drafter.state_dict().items())
    assert all(torch.count_nonzero(layer.lora_B[1]) for layer in adapted_layers(second.drafter).values())
    served = with_weights(second.drafter, published, torch.float32)
    ahead = [each.exclude(("sequence", "adapter")) for each in stream[18:]]
    shared, own = replay(served, ahead, SHAPE), replay(served, stream[18:], SHAPE)
    assert torch.equal(own.rounds[1::2], shared.rounds[1::2]), "what is served of globex is the shared drafter"


@pytest.mark.parametrize("names", [(), ("acme",), ("globex", "acme")])
def test_a_state_of_other_adapters_is_refused_by_name(make: Make, names: tuple[str, ...]) -> None:
    first = make(adapters=TENANTS)
    first.learner.save()
    second = make(adapters=names)
    before = {name: value.clone() for name, value in second.drafter.state_dict().items()}
    message = f"was trained with drafter.adapters=['acme', 'globex'], and this run has {list(names)}; set the same"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        second.learner.resume(first.states)
    assert all(torch.equal(value, before[name]) for name, value in second.drafter.state_dict().items())
