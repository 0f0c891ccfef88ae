"""Weights that are written into a policy, in TorchRL's manner, are a new version from the next round on."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector

from aurora_rl.envs import Completion, Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.policies import DrafterPolicy, Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.prefix_cache import PrefixCache
from aurora_rl.testing import tiny_target
from aurora_rl.trajectories import pack

SHAPE = TreeShape(3)


class Served:
    """A tiny target on two slots, and a collector of its rounds."""

    def __init__(self, dtype: torch.dtype) -> None:
        target = tiny_target(dtype=dtype)
        torch.manual_seed(0)
        self.learner = Eagle3Drafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(32))
        self.dtype, self.done, ids = dtype, list[Completion](), itertools.count()
        self.engine = TransformersEngine(target, num_slots=2, max_length=64, feature_layers=self.learner.feature_layers)
        self.env = SpecDecodeEnv(
            self.engine,
            lambda: Request(next(ids), torch.randint(0, 32, (5,)), SamplingParams(max_tokens=12)),
            num_nodes=3,
            on_completion=self.done.append,
        )
        drafter = self.learner.serving_copy(dtype)
        self.policy = DrafterPolicy(drafter, self.engine.store, num_nodes=3, shape=SHAPE)
        self.collector = Collector(self.env, self.policy, frames_per_batch=12, total_frames=-1)

    def moved(self) -> Eagle3Drafter:
        """The drafter with other weights, in the served dtype."""
        new = copy.deepcopy(self.learner)
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return new.to(self.dtype)


class Holder(nn.Module):
    """Names a drafter's weights as a policy does."""

    def __init__(self, drafter: Eagle3Drafter) -> None:
        super().__init__()
        self.drafter = drafter


def by_update(served: Served, new: Eagle3Drafter) -> None:
    served.collector.update_policy_weights_(TensorDict.from_module(Holder(new)))


def by_state_dict(served: Served, new: Eagle3Drafter) -> None:
    served.policy.load_state_dict(Holder(new).state_dict())


def by_to_module(served: Served, new: Eagle3Drafter) -> None:
    TensorDict.from_module(Holder(new)).to_module(served.policy)


def by_install(served: Served, new: Eagle3Drafter) -> None:
    served.policy.install(new.published(), version=served.policy.version + 1)


WAYS = [by_update, by_state_dict, by_to_module, by_install]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_written_weights_draft_from_the_next_round_on(
    way: Callable[[Served, Eagle3Drafter], None], dtype: torch.dtype
) -> None:
    served = Served(dtype)
    rounds = iter(served.collector)
    assert (next(rounds)["policy_version"] == 0).all()
    new = served.moved()
    way(served, new)
    batch = next(rounds)  # in the midst of requests
    assert (batch["policy_version"] == 1).all() and (batch["cache_version"] == 1).all()
    served.done.clear()
    while len(served.done) < 4:
        next(rounds)
    assert served.policy.version == 1
    served.collector.shutdown()

    recorded = pack([each.trajectory for each in served.done])
    assert {0, 1} >= set(recorded["rounds", "policy_version"].tolist())
    fresh = torch.repeat_interleave(recorded["rounds", "policy_version"] == 1, recorded["rounds", "offset"].diff())
    own, before = (
        (drafter.float().score(recorded) - recorded["nodes", "log_probs"])[fresh].abs().mean().item()
        for drafter in (new, served.learner)
    )
    # In bfloat16 the recorded numbers are those of bfloat16 products.
    assert own < (1e-4 if dtype == torch.float32 else 0.1) and before > 0.3, (own, before)


def test_a_version_that_is_set_along_with_the_weights_is_theirs() -> None:
    served = Served(torch.float32)
    rounds = iter(served.collector)
    next(rounds)
    by_state_dict(served, served.moved())
    served.policy.version = 9
    assert (next(rounds)["policy_version"] == 9).all()
    by_state_dict(served, served.moved())
    assert (next(rounds)["policy_version"] == 10).all()
    served.policy.version = 20  # of itself it is no write
    assert (next(rounds)["policy_version"] == 20).all() and bool(served.policy.drafter.cached.any())
    by_state_dict(served, served.moved())
    assert (next(rounds)["policy_version"] == 21).all()
    served.collector.shutdown()


def test_kept_rows_of_old_weights_are_dropped() -> None:
    served = Served(torch.float32)
    served.policy.prefix_cache = PrefixCache(2**20)
    rounds = iter(served.collector)
    while len(served.done) < 3:
        next(rounds)
    assert served.policy.prefix_cache.num_tokens
    by_state_dict(served, served.moved())
    td = served.env.reset()
    served.policy(td)
    assert not served.policy.prefix_cache.num_tokens
    served.collector.shutdown()


def test_a_server_takes_published_weights_alone_for_a_version() -> None:
    served = Served(torch.float32)
    served.policy.notices_writes = False
    rounds = iter(served.collector)
    by_state_dict(served, served.moved())
    assert (next(rounds)["policy_version"] == 0).all()
    served.collector.shutdown()
