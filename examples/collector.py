"""Learn while serving, in TorchRL's manner: a collector, a loss module, an optimizer.

python examples/collector.py [--batches 60]
"""

from __future__ import annotations

import argparse
import itertools

import torch

from aurora_rl.collectors import TrajectoryCollector
from aurora_rl.envs import Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.objectives import ImitationLoss
from aurora_rl.policies import DrafterPolicy, Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.testing import tiny_target
from aurora_rl.training.gate import replay
from aurora_rl.trajectories import unpack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=60)
    batches = parser.parse_args().batches
    torch.manual_seed(0)
    model, shape = tiny_target(dtype=torch.float32), TreeShape(depth=3)  # any causal LM of transformers
    parts = TargetParts.of(model)
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(32))
    # Not a SpeculativeDecoder, which serves a copy: here the policy's own weights learn.
    engine = TransformersEngine(model, num_slots=32, max_length=64, feature_layers=drafter.feature_layers)
    requests = (Request(i, torch.randint(0, 32, (8,)), SamplingParams(max_tokens=16)) for i in itertools.count())
    env = SpecDecodeEnv(engine, lambda: next(requests), num_nodes=3)
    policy = DrafterPolicy(drafter, engine.store, num_nodes=3, shape=shape)

    collector = TrajectoryCollector(env, policy, frames_per_batch=512)
    loss_module = ImitationLoss(drafter, parts.head)
    optimizer = torch.optim.AdamW(loss_module.parameters(), lr=1e-2)
    stream = iter(collector)
    held_out = unpack(next(stream))  # nothing is learned from the first batch

    def acceptance_length() -> float:
        return replay(drafter.serving_copy(torch.float32), held_out, shape).acceptance_length

    print(f"before: acceptance length {acceptance_length():.2f} on {len(held_out)} requests that are not learned from")
    for batch in itertools.islice(stream, batches):
        loss = loss_module(batch)
        loss["loss_imitation"].backward()
        optimizer.step()
        optimizer.zero_grad()
        collector.update_policy_weights_()
        print(f"version {policy.version}: loss {loss['loss_imitation'].item():.3f} of {len(batch['request'])} requests")
    print(f"after: acceptance length {acceptance_length():.2f}")
    collector.shutdown()


if __name__ == "__main__":
    main()
