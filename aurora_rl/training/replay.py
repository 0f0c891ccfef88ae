"""The replay buffer of packed trajectories."""

from __future__ import annotations

import torch
from torchrl.data import ListStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler

from aurora_rl.trajectories import pack


def trajectory_buffer(capacity: int, batch_size: int, seed: int = 0) -> ReplayBuffer:
    """A TorchRL replay buffer whose samples are packed batches.

    Args:
        capacity: Trajectories kept; the oldest goes first.
        batch_size: Trajectories of a sample.
        seed: Seed of the sampling.
    """
    generator = torch.Generator().manual_seed(seed)
    return ReplayBuffer(
        storage=ListStorage(capacity),
        sampler=RandomSampler(),
        batch_size=batch_size,
        collate_fn=pack,
        generator=generator,
    )
