"""The replay buffer of packed trajectories."""

from __future__ import annotations

import torch
from torchrl.data import ListStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler

from aurora_rl.trajectories import pack


def trajectory_buffer(capacity: int, batch_size: int, seed: int = 0) -> ReplayBuffer:
    """Return a TorchRL replay buffer of ``capacity`` trajectories, whose samples are packed batches.

    The oldest trajectory goes first.
    """
    return ReplayBuffer(
        storage=ListStorage(capacity),
        sampler=RandomSampler(),
        batch_size=batch_size,
        collate_fn=pack,
        generator=torch.Generator().manual_seed(seed),
    )
