"""The replay buffer of packed trajectories."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ListStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler
from torchrl.data.replay_buffers.storages import Storage
from typing_extensions import override

from aurora_rl.training.shares import engine_of, in_turns
from aurora_rl.trajectories import pack, size_of

_NEWEST = 32  # trajectories
_PRESENT = 2  # times the capacity: trajectories of others after which an engine that sends none has gone
_LATELY = 8  # times the newest that are asked for: the same, for them
_NOTES = ("source", "tenant", "captured", "seconds")  # added by the collector to each trajectory


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
    """Keeps the newest trajectories within a number and a size, in fair shares of the engines that sent them.

    The oldest of the engine that has most goes first. Trajectories of an engine that sends little stay longer. An
    engine that has sent none of the last ``2 * capacity`` trajectories has no share: its own go before all others.

    Args:
        capacity: Most trajectories.
        max_bytes: Most bytes of them; the newest stays even if it has more. None keeps as many as there may be.
    """

    _storage: list[TensorDictBase]

    def __init__(self, capacity: int, max_bytes: int | None = None) -> None:
        super().__init__(capacity)
        self._max_bytes = math.inf if max_bytes is None else max_bytes
        self._recent: deque[str] = deque(maxlen=_PRESENT * capacity)  # engines of the last ones, here or not
        self._engines: list[str] = []  # one for each trajectory
        self._number, self._bytes = Counter[str](), Counter[str]()  # for each engine's trajectories

    @override
    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        # The writer's places are those of a ring; here the newest is always the last.
        for trajectory in [data] if isinstance(data, TensorDictBase) else data:
            self._recent.append(engine_of(trajectory))
            self._append(trajectory)
            while len(self._storage) > 1 and (full := self._full()) is not None:
                self._take_out(self._first_to_go(full))
        self._bump_mutation_revision()

    def _append(self, trajectory: TensorDictBase) -> None:
        engine = engine_of(trajectory)
        self._storage.append(trajectory)
        self._engines.append(engine)
        self._number[engine] += 1
        self._bytes[engine] += size_of(trajectory)

    def _full(self) -> Counter[str] | None:
        """Return what there is too much of, by engine: bytes or trajectories; None if there is room."""
        if self._bytes.total() > self._max_bytes:
            return self._bytes
        return self._number if len(self._storage) > self.max_size else None

    def _first_to_go(self, held: Counter[str]) -> int:
        """Return the place of the oldest trajectory of the engine that has most; the newest trajectory stays."""
        newest = self._engines[-1]
        claims = {
            engine: held[engine] if engine in self._recent else math.inf
            for engine, number in self._number.items()
            if number > (engine == newest)
        }
        most = max(claims.values())
        largest = {engine for engine, claim in claims.items() if claim == most}
        return next(place for place, engine in enumerate(self._engines) if engine in largest)

    def _take_out(self, place: int) -> None:
        trajectory, engine = self._storage.pop(place), self._engines.pop(place)
        self._number[engine] -= 1
        self._bytes[engine] -= size_of(trajectory)
        if not self._number[engine]:
            del self._number[engine], self._bytes[engine]

    def _keep(self, trajectories: Iterable[TensorDictBase]) -> None:
        self._storage, self._engines = [], []
        self._number.clear()
        self._bytes.clear()
        for trajectory in trajectories:
            self._append(trajectory)
        self._bump_mutation_revision()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"trajectories": [as_state(each) for each in self._storage], "recent": list(self._recent)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._keep(of_state(each) for each in state_dict["trajectories"])
        # A state of an earlier release does not say who sent what is here no longer.
        self._recent = deque(state_dict.get("recent", self._engines), maxlen=self._recent.maxlen)

    def of_requests(self, requests: Collection[int]) -> list[TensorDictBase]:
        """Return the trajectories of these requests."""
        return [each for each in self._storage if int(each["request"]) in requests]

    def places(self, trajectories: Sequence[TensorDictBase]) -> list[int]:
        """Return the places of these very objects, all of which are here."""
        places = {id(each): place for place, each in enumerate(self._storage)}
        return [places[id(each)] for each in trajectories]

    def parted(self, trajectories: Sequence[TensorDictBase]) -> tuple[list[TensorDictBase], list[TensorDictBase]]:
        """Return those of these very objects that are here, and those that are not."""
        here = {id(each) for each in self._storage}
        held = [each for each in trajectories if id(each) in here]
        return held, [each for each in trajectories if id(each) not in here]

    def newest(self, most: int) -> list[int]:
        """Return the places of the newest trajectories, as many of each engine as there are.

        Those of engines that sent one of the last ``8 * most``; where none of these is here, those of all.
        """
        lately = set(islice(reversed(self._recent), _LATELY * most))
        backwards = range(len(self._engines))[::-1]
        places = [place for place in backwards if self._engines[place] in lately] or backwards
        turns = in_turns([self._engines[place] for place in places])
        return sorted(places[turn] for turn in turns[:most])

    def remove(self, trajectories: Sequence[TensorDictBase]) -> None:
        """Remove these very objects."""
        gone = {id(each) for each in trajectories}
        self.drop(lambda each: id(each) in gone)

    def drop(self, gone: Callable[[TensorDictBase], bool]) -> int:
        """Remove the trajectories that meet a condition, and return how many they were."""
        kept = [each for each in self._storage if not gone(each)]
        if dropped := len(self._storage) - len(kept):
            self._keep(kept)
        return dropped


class RecentSampler(RandomSampler):
    """Draws every second batch, on average, from the newest 32 trajectories, and the others from all.

    So learning follows traffic that shifts, and what came before is not forgotten. Of the newest, as many are of each
    engine that sent one of the last 256, however much it sends.
    """

    @override
    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        if torch.rand((), dtype=torch.float32, generator=self._rng) < 0.5:
            return super().sample(storage, batch_size)
        newest = torch.tensor(cast("NewestTrajectories", storage).newest(_NEWEST))
        return newest[torch.randint(len(newest), (batch_size,), generator=self._rng)], {}


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
