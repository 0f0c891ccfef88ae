"""TorchRL's collector with batches for objectives: what it yields, when it ends, and the weights that it takes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector

from aurora_rl.collectors import TrajectoryCollector
from aurora_rl.envs import Completion, Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.objectives import ImitationLoss, SumLoss, get_objective
from aurora_rl.policies import DrafterPolicy, Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.testing import tiny_target
from aurora_rl.trajectories import unpack

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


class World:
    """A tiny target on two slots that serves so many requests, and a drafter."""

    def __init__(
        self, requests: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu", **settings: Any
    ) -> None:
        model = tiny_target(dtype=dtype).to(device)
        self.parts = TargetParts.of(model)
        torch.manual_seed(0)
        self.drafter = Eagle3Drafter.from_target(self.parts, draft_vocab=torch.arange(32)).to(device)
        self.engine = TransformersEngine(model, num_slots=2, max_length=64, feature_layers=self.drafter.feature_layers)
        ids = itertools.count() if requests is None else iter(range(requests))

        def request() -> Request | None:
            number = next(ids, None)
            return (
                number
                if number is None
                else Request(number, torch.arange(4) + number % 8, SamplingParams(max_tokens=9))
            )

        self.env = SpecDecodeEnv(self.engine, request, num_nodes=3, **settings)

    def policy(self, drafter: Eagle3Drafter) -> DrafterPolicy:
        return DrafterPolicy(drafter, self.engine.store, num_nodes=3, shape=TreeShape(3))


def test_every_request_is_in_one_batch_whole_and_the_last_ends_the_collector() -> None:
    done: list[Completion] = []
    world = World(7, on_completion=done.append)
    collector = TrajectoryCollector(world.env, world.policy(world.drafter), frames_per_batch=6)
    batches = list(collector)
    collector.shutdown()
    found = [each for batch in batches for each in unpack(batch)]
    assert sorted(int(each["request"]) for each in found) == list(range(7)) and len(batches) > 1
    assert all(len(batch["request"]) for batch in batches)
    texts = {each.request.id: torch.cat([each.request.prompt, each.tokens]) for each in done}  # called as before
    assert all(torch.equal(each["sequence", "tokens"], texts[int(each["request"])]) for each in found)


def test_frames_bound_a_collector_whose_requests_do_not_end() -> None:
    world = World()
    batches = list(TrajectoryCollector(world.env, world.policy(world.drafter), frames_per_batch=8, total_frames=80))
    assert sum(len(batch["request"]) for batch in batches) >= 4


def test_a_collector_that_was_shut_down_keeps_nothing_of_the_next_one_s_requests() -> None:
    done: list[Completion] = []
    world = World(on_completion=done.append)
    policy = world.policy(world.drafter)
    first = TrajectoryCollector(world.env, policy, frames_per_batch=8, total_frames=16)
    found = [each for batch in first for each in unpack(batch)]
    first.shutdown(close_env=False)
    second = TrajectoryCollector(world.env, policy, frames_per_batch=8, total_frames=80)
    found += [each for batch in second for each in unpack(batch)]
    assert [int(each["request"]) for each in found] == [each.request.id for each in done]
    assert not first._ended


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_batches_are_on_the_drafter_s_device(device: str) -> None:
    world = World(2, device=device)
    (batch, *_) = TrajectoryCollector(world.env, world.policy(world.drafter), frames_per_batch=16)
    assert {value.device.type for value in batch.values(True, True)} == {device}
    ImitationLoss(world.drafter, world.parts.head)(batch)["loss_imitation"].backward()


def test_objectives_take_its_batches_and_not_those_of_rounds() -> None:
    world = World(6)
    loss = SumLoss(
        [ImitationLoss(world.drafter, world.parts.head), get_objective("discard")(world.drafter, world.parts.head)]
    )
    policy = world.policy(world.drafter)
    batch = next(iter(TrajectoryCollector(world.env, policy, frames_per_batch=32)))
    loss(batch)["loss_imitation"].backward()
    assert all(parameter.grad is not None for parameter in world.drafter.parameters())

    rounds = next(
        iter(
            Collector(
                World(6).env,
                lambda td: td.update(world.env.full_action_spec.zero()),
                frames_per_batch=4,
                total_frames=4,
            )
        )
    )
    with pytest.raises(ValueError, match=r"'imitation' takes packed .* batch of rounds; iterate over .*TrajectoryColl"):
        ImitationLoss(world.drafter, world.parts.head)(rounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_policys_own_drafter_may_be_the_one_that_learns(dtype: torch.dtype) -> None:
    world = World(dtype=dtype)
    drafter = world.drafter.to(dtype)
    policy = world.policy(drafter)
    collector, loss = (
        TrajectoryCollector(world.env, policy, frames_per_batch=16),
        ImitationLoss(drafter, world.parts.head),
    )
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-2)
    before = copy.deepcopy(drafter.state_dict())
    for number, batch in enumerate(itertools.islice(collector, 4)):
        assert policy.version == number and set(batch["rounds", "policy_version"].tolist()) <= {number - 1, number}
        loss(batch)["loss_imitation"].backward()
        optimizer.step()
        optimizer.zero_grad()
        collector.update_policy_weights_()
    collector.shutdown()
    assert not any(torch.equal(before[name], value) for name, value in drafter.state_dict().items())


def test_a_serving_copy_takes_the_weights_of_the_drafter_that_learned() -> None:
    world = World(dtype=torch.bfloat16)
    policy = world.policy(world.drafter.serving_copy(torch.bfloat16))
    collector = TrajectoryCollector(world.env, policy, frames_per_batch=16)
    stream = iter(collector)
    next(stream)
    with pytest.raises(ValueError, match=r"serving copy, which does not learn; .*update_policy_weights_\(drafter\)"):
        collector.update_policy_weights_()
    with torch.no_grad():
        for parameter in world.drafter.parameters():
            parameter.add_(0.1)
    collector.update_policy_weights_(world.drafter)
    next(stream)
    assert policy.version == 1
    held = policy.drafter.state_dict()
    assert all(torch.equal(held[name], value.bfloat16()) for name, value in world.drafter.state_dict().items())
    collector.update_policy_weights_(TensorDict.from_module(nn.ModuleDict({"drafter": world.drafter})))
    assert 2 in next(stream)["rounds", "policy_version"]
    collector.shutdown()


def test_what_cannot_be_collected_is_named() -> None:
    world = World(record=False)
    with pytest.raises(ValueError, match="records no trajectories; make it by .*record=True"):
        TrajectoryCollector(world.env, world.policy(world.drafter), frames_per_batch=4)
    with pytest.raises(ValueError, match="env is function; give a SpecDecodeEnv"):
        TrajectoryCollector(lambda: world.env, world.policy(world.drafter), frames_per_batch=4)  # type: ignore[arg-type]
