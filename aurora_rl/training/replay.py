"""The replay buffer of packed trajectories."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ListStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler
from torchrl.data.replay_buffers.storages import Storage
from typing_extensions import override

from aurora_rl.trajectories import pack, size_of

_NEWEST = 32  # trajectories
_NOTES = ("source", "tenant", "captured", "seconds")  # of the collector, on each trajectory


def as_state(trajectory: TensorDictBase) -> dict[str, Any]:
    """Return a trajectory as tensors by name, and what the collector noted, which a ``state_dict`` of it would lose."""
    found = {name: trajectory.get_non_tensor(name, default=None) for name in _NOTES}
    notes = {name: note for name, note in found.items() if note is not None}
    return {"notes": notes, "tensors": dict(trajectory.exclude(*_NOTES).flatten_keys(".").items())}


def of_state(state: Mapping[str, Any]) -> TensorDict:
    """Return the trajectory of :func:`as_state`."""
    trajectory = TensorDict(state["tensors"], batch_size=[]).unflatten_keys(".")
    for name, note in state["notes"].items():
        trajectory.set_non_tensor(name, note)
    return trajectory


class NewestTrajectories(ListStorage):
    """Keeps the newest trajectories within a number and a size; the oldest goes first.

    Args:
        capacity: Most trajectories.
        max_bytes: Most bytes of them; the newest stays even if it has more. None keeps as many as there may be.
    """

    _storage: list[TensorDictBase]

    def __init__(self, capacity: int, max_bytes: int | None = None) -> None:
        super().__init__(capacity)
        self._max_bytes, self._bytes = max_bytes, 0

    @override
    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        # The writer's places are those of a ring; here the newest is always the last.
        for trajectory in [data] if isinstance(data, TensorDictBase) else data:
            self._storage.append(trajectory)
            self._bytes += size_of(trajectory)
            while len(self._storage) > self.max_size or (self._over() and len(self._storage) > 1):
                self._bytes -= size_of(self._storage.pop(0))
        self._bump_mutation_revision()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"trajectories": [as_state(each) for each in self._storage]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._storage = [of_state(each) for each in state_dict["trajectories"]]
        self._bytes = sum(map(size_of, self._storage))
        self._bump_mutation_revision()

    def _over(self) -> bool:
        return self._max_bytes is not None and self._bytes > self._max_bytes

    def of_requests(self, requests: Collection[int]) -> list[TensorDictBase]:
        """Return the trajectories of these requests."""
        return [each for each in self._storage if int(each["request"]) in requests]

    def remove(self, trajectories: Sequence[TensorDictBase]) -> None:
        """Remove these very objects."""
        gone = {id(each) for each in trajectories}
        self.drop(lambda each: id(each) in gone)

    def drop(self, gone: Callable[[TensorDictBase], bool]) -> int:
        """Remove the trajectories that meet a condition, and return how many they were."""
        kept = [each for each in self._storage if not gone(each)]
        if dropped := len(self._storage) - len(kept):
            self._storage, self._bytes = kept, sum(map(size_of, kept))
            self._bump_mutation_revision()
        return dropped


class RecentSampler(RandomSampler):
    """Draws every second batch, on average, from the newest 32 trajectories, and the others from all.

    So learning follows traffic that shifts, and what came before is not forgotten.
    """

    @override
    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        if torch.rand((), dtype=torch.float32, generator=self._rng) < 0.5:
            return super().sample(storage, batch_size)
        count = len(storage)
        return torch.randint(max(count - _NEWEST, 0), count, (batch_size,), generator=self._rng), {}


def trajectory_buffer(capacity: int, batch_size: int, seed: int = 0, max_bytes: int | None = None) -> ReplayBuffer:
    """Return a TorchRL replay buffer of :class:`NewestTrajectories`, whose samples are packed batches.

    Args:
        capacity: Most trajectories.
        batch_size: Trajectories of a sample, drawn by :class:`RecentSampler`.
        seed: Seed of the draws.
        max_bytes: Most bytes of the trajectories; None sets no limit.
    """
    return ReplayBuffer(
        storage=NewestTrajectories(capacity, max_bytes),
        sampler=RecentSampler(),
        batch_size=batch_size,
        collate_fn=pack,
        generator=torch.Generator().manual_seed(seed),
    )
