"""SpecDecodeEnv under TorchRL's own collector: a target, a drafter, `Collector(env, policy)`.

python examples/collector.py
"""

from __future__ import annotations

import itertools

import torch
from torchrl.collectors import Collector

from aurora_rl.envs import Request, SpecDecodeEnv, TransformersEngine
from aurora_rl.policies import DrafterPolicy, Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.testing import tiny_target


def main() -> None:
    torch.manual_seed(0)
    model = tiny_target(dtype=torch.float32)
    drafter = Eagle3Drafter.from_target(TargetParts.of(model), draft_vocab=torch.arange(32)).eval()
    engine = TransformersEngine(model, num_slots=2, max_length=64, feature_layers=drafter.feature_layers)
    ids = itertools.count()
    env = SpecDecodeEnv(engine, lambda: Request(next(ids), torch.randint(0, 32, (5,)), 16), num_nodes=6)
    policy = DrafterPolicy(drafter, engine.store, num_nodes=6, shape=TreeShape(depth=3, width=2, num_nodes=6))

    collector = Collector(env, policy, frames_per_batch=16, total_frames=48)
    for batch in collector:
        accepted = batch["next", "verifier", "accepted"].sum(-1).float().mean()
        delivered = batch["next", "reward"].mean()
        print(f"{batch.numel()} rounds: {accepted:.2f} drafts accepted and {delivered:.2f} tokens delivered in each")
    collector.shutdown()


if __name__ == "__main__":
    main()
