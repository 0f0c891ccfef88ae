"""The replay buffer of packed trajectories."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import ListStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler
from typing_extensions import override

from aurora_rl.trajectories import pack, size_of


def as_state(trajectory: TensorDictBase) -> dict[str, Any]:
    """Return a trajectory as tensors by name, with its source, which a ``state_dict`` of it would lose."""
    source = trajectory.get_non_tensor("source", default="")
    return {"source": source, "tensors": dict(trajectory.exclude("source").flatten_keys(".").items())}


def of_state(state: Mapping[str, Any]) -> TensorDict:
    """Return the trajectory of :func:`as_state`."""
    trajectory = TensorDict(state["tensors"], batch_size=[]).unflatten_keys(".")
    if state["source"]:
        trajectory.set_non_tensor("source", state["source"])
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
        self._storage = [each for each in self._storage if id(each) not in gone]
        self._bytes = sum(map(size_of, self._storage))
        self._bump_mutation_revision()


def trajectory_buffer(capacity: int, batch_size: int, seed: int = 0, max_bytes: int | None = None) -> ReplayBuffer:
    """Return a TorchRL replay buffer of :class:`NewestTrajectories`, whose samples are packed batches."""
    return ReplayBuffer(
        storage=NewestTrajectories(capacity, max_bytes),
        sampler=RandomSampler(),
        batch_size=batch_size,
        collate_fn=pack,
        generator=torch.Generator().manual_seed(seed),
    )
