"""A learner with several engines: what passed the gate goes to one of them first, and to all or back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learner_loops import HANDSHAKE, Make, send, step_until
from processes import wait
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.weights import WeightReceiver
from aurora_rl.training.engine_canary import EngineTrialRules
from aurora_rl.trajectories import acceptance_length

RULES = EngineTrialRules(share=0.25, requests=1, false_alarm_rate=0.2, margin=0.2, max_requests=6)


class Fleet:
    """Engines of a learner, which load what comes and answer with recorded requests."""

    def __init__(self, loop: SimpleNamespace, receivers: list[WeightReceiver]) -> None:
        self.loop, self.receivers = loop, receivers
        self.weights: dict[str, dict[str, Tensor]] = {}

    def load(self) -> bool:
        """Load what has come, and return whether that is what the engines are to have."""
        for receiver in self.receivers:
            if (latest := receiver.latest()) is not None:
                version, weights = latest
                self.weights[receiver.name] = dict(weights.flatten_keys(".").items())
                receiver.acknowledge(version, checksum(weights), 1.0)
        wanted = self.loop.publisher._book._wanted
        return all(receiver.version == wanted(receiver.name) for receiver in self.receivers)

    def having(self, weights: dict[str, Tensor]) -> list[str]:
        return [
            name
            for name, its in self.weights.items()
            if all(torch.equal(tensor, weights[key]) for key, tensor in its.items())
        ]

    def turn(self, new: TensorDict, old: TensorDict, weights: dict[str, Tensor]) -> None:
        """Answer a request at each engine: ``new`` at those that have these weights."""
        wait(self.load)
        having = self.having(weights)
        for receiver in self.receivers:
            answer = (new if receiver.name in having else old).clone()
            answer["rounds", "policy_version"].fill_(receiver.version)
            self.loop.sink.extend(answer, None, 1.0)
        send(self.loop, [])
        self.loop.learner.step(wait_s=0.01)

    def close(self) -> None:
        for receiver in self.receivers[1:]:  # the first is the loop's
            receiver.close()


@pytest.fixture
def fleet(make: Make) -> Iterator[Any]:
    """Makes a learner with three engines."""
    with ExitStack() as stack:

        def build(**options: Any) -> Fleet:
            loop = make(gate=2, publish_every=2, canary=RULES, **options)
            others = [WeightReceiver(loop.publisher.address, handshake=HANDSHAKE, name=name) for name in ("b", "c")]
            found = Fleet(loop, [loop.receiver, *others])
            stack.callback(found.close)
            wait(lambda: len(loop.publisher.engines) == 3)
            return found

        yield build


def tried(fleet: Fleet, served: list[TensorDict]) -> dict[str, Tensor]:
    """Let a candidate pass the gate, and return its weights."""
    loop = fleet.loop
    send(loop, served[:2])
    step_until(loop, lambda: loop.events("candidate"))
    send(loop, served[2:4])
    step_until(loop, lambda: loop.events("gate"))
    assert loop.learner._canary.trying
    return loop.learner._canary._new


def by_acceptance(served: list[TensorDict]) -> list[TensorDict]:
    def length(trajectory: TensorDict) -> float:
        tokens, rounds = acceptance_length(trajectory)
        return tokens / rounds

    return sorted(served[4:], key=length)


def test_what_passed_the_gate_is_served_by_one_engine_first_and_then_by_all(
    fleet: Any, served: list[TensorDict]
) -> None:
    fleet = fleet()
    loop, learner = fleet.loop, fleet.loop.learner
    day0 = learner._serving
    candidate = tried(fleet, served)
    (trial,), (gate,) = loop.events("engine_trial"), loop.events("gate")
    assert gate["publish"] and gate["version"] == trial["version"] and learner.version == 0
    assert learner._serving is day0 and (trial["against"], trial["of"]) == (0, 3)
    wait(fleet.load)
    assert fleet.having(candidate) == trial["engines"] and len(fleet.having(day0)) == 1  # one engine got nothing
    low, *_, high = by_acceptance(served)
    while not loop.events("engine_verdict"):
        fleet.turn(new=high, old=low, weights=candidate)
        assert len(fleet.having(candidate)) == 1
        assert len(loop.events("candidate")) == 1 or not learner._canary.trying  # the next waits
    (verdict,) = loop.events("engine_verdict")
    assert verdict["promote"] and verdict["published"] == learner.version
    assert verdict["acceptance_length"]["new"] > verdict["acceptance_length"]["old"]
    assert verdict["tokens_per_second"]["new"] > 0
    wait(fleet.load)
    assert len(fleet.having(candidate)) == 3 and {each.version for each in fleet.receivers} == {learner.version}
    assert all(torch.equal(tensor, candidate[name]) for name, tensor in learner._serving.items())
    assert (loop.states.parent / "versions" / str(learner.version)).is_dir()
    step_until(loop, lambda: len(loop.events("candidate")) == 2)


def test_a_worse_candidate_is_taken_back_and_the_next_is_gated_against_what_is_served(
    fleet: Any, served: list[TensorDict]
) -> None:
    fleet = fleet()
    loop, learner = fleet.loop, fleet.loop.learner
    day0 = learner._serving
    candidate = tried(fleet, served)
    low, *_, high = by_acceptance(served)
    while not loop.events("engine_verdict"):
        fleet.turn(new=low, old=high, weights=candidate)
    (verdict,) = loop.events("engine_verdict")
    assert not verdict["promote"] and verdict["reason"] == "acceptance length fell"
    wait(fleet.load)
    assert fleet.having(candidate) == [] and learner.version == 0 and learner._serving is day0
    assert sum(each.version == 0 for each in fleet.receivers) == 1
    assert not (loop.states.parent / "versions").exists() and not loop.events("gate_against")


@pytest.mark.parametrize("saved", ["before", "within"])
def test_a_learner_that_resumes_within_a_trial_publishes_what_all_had(
    fleet: Any, make: Make, served: list[TensorDict], saved: str
) -> None:
    """Killed, it has saved before the trial, whose numbers it does not know then."""
    first = fleet()
    if saved == "before":
        first.loop.learner.save()
    candidate = tried(first, served)
    wait(first.load)
    if saved == "within":
        first.loop.learner.save()
    day0, version = first.loop.learner._serving, first.loop.events("engine_trial")[0]["version"]
    first.loop.learner.close()

    second = make(version=version, checksum=checksum(candidate))  # an engine that has the candidate
    second.learner.resume(first.loop.states)
    step_until(second, lambda: second.publisher.engines and not second.publisher.overtaken)
    published, weights = newest(second)
    assert published > version
    assert all(torch.equal(tensor, day0[name]) for name, tensor in weights.flatten_keys(".").items())
    assert not second.events("rejected")


def newest(loop: SimpleNamespace) -> tuple[int, TensorDict]:
    """What the engine of a loop gets, once it is what it is to have."""
    found: list[tuple[int, TensorDict]] = []

    def arrived() -> bool:
        if (latest := loop.receiver.latest()) is not None:
            found.append(latest)
        return bool(found) and found[-1][0] == loop.learner.version

    wait(arrived)
    return found[-1]
