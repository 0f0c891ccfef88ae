"""Environments in several processes under TorchRL's own collectors: each process has an engine and a policy.

python examples/multi_collector.py [--processes 2]
"""

from __future__ import annotations

import argparse
import functools
import itertools

import torch
from torchrl.collectors import Collector, MultiSyncCollector

from aurora_rl.envs import Request, SamplingParams, SpecDecodeEnv
from aurora_rl.policies import DrafterPolicy, Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.testing import tiny_target


@functools.cache
def decoder() -> SpeculativeDecoder:
    """The parts of this process, of which its environment and its policy share the engine."""
    torch.manual_seed(0)
    model = tiny_target(dtype=torch.float32)
    drafter = Eagle3Drafter.from_target(TargetParts.of(model), draft_vocab=torch.arange(32))
    requests = (Request(i, torch.randint(0, 32, (5,)), SamplingParams(max_tokens=16)) for i in itertools.count())
    return SpeculativeDecoder(model, drafter, requests, shape=TreeShape(3, 2, 6), max_length=64, num_slots=2)


def make_env() -> SpecDecodeEnv:
    return decoder().env


def make_policy() -> DrafterPolicy:
    policy = decoder().policy
    assert policy is not None  # there is a drafter
    return policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=1, help="each has an engine of its own")
    count = parser.parse_args().processes
    frames = {"frames_per_batch": 16 * count, "total_frames": 48 * count}
    if count == 1:
        collector = Collector(make_env(), make_policy(), **frames)
    else:
        collector = MultiSyncCollector([make_env] * count, policy_factory=[make_policy] * count, **frames)
    for batch in collector:
        accepted = batch["next", "verifier", "accepted"].sum(-1).float().mean()
        delivered = batch["next", "reward"].mean()
        print(f"{batch.numel()} rounds: {accepted:.2f} drafts accepted and {delivered:.2f} tokens delivered in each")
    collector.shutdown()


if __name__ == "__main__":
    main()
