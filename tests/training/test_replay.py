from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.testing import serve, tiny_target
from aurora_rl.training.replay import NewestTrajectories, as_state, of_state, trajectory_buffer
from aurora_rl.trajectories import size_of


@pytest.fixture(scope="module")
def trajectories() -> list[TensorDict]:
    target = tiny_target()
    drafter = Eagle3Drafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(32)).double()
    prompts = [torch.arange(2 + i) for i in range(6)]
    return serve(drafter, target, prompts, shape=TreeShape(2), max_new_tokens=4, num_slots=6)


def test_samples_are_packed_batches(trajectories: list[TensorDict]) -> None:
    buffer = trajectory_buffer(10, 3)
    buffer.extend(trajectories[:2])
    buffer.extend(trajectories[2:3])
    batch = buffer.sample()
    assert batch["request"].shape == (3,)
    for i, request in enumerate(batch["request"].tolist()):
        start, end = batch["sequence", "offset"][i : i + 2].tolist()
        assert batch["sequence", "tokens"][start:end].equal(trajectories[request]["sequence", "tokens"])


def test_the_oldest_goes_first(trajectories: list[TensorDict]) -> None:
    buffer = trajectory_buffer(3, 16)
    for trajectory in trajectories:
        buffer.extend([trajectory])
    assert len(buffer) == 3
    assert set(buffer.sample()["request"].tolist()) <= {3, 4, 5}


def test_the_seed_decides(trajectories: list[TensorDict]) -> None:
    def draws(seed: int) -> list[int]:
        buffer = trajectory_buffer(10, 20, seed)
        buffer.extend(trajectories)
        return buffer.sample()["request"].tolist()

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_every_second_batch_is_of_the_newest(trajectories: list[TensorDict]) -> None:
    buffer = trajectory_buffer(200, 4)
    for request in range(160):
        buffer.extend([trajectories[0].replace({"request": torch.tensor(request)})])
    oldest = torch.tensor([int(buffer.sample()["request"].min()) for _ in range(200)])
    # A batch of all 160 has none before the newest 32 with a chance of 0.0016.
    assert 75 < int((oldest >= 128).sum()) < 125
    assert int(oldest.min()) < 16


def test_the_size_is_bounded_in_bytes_too(trajectories: list[TensorDict]) -> None:
    room = size_of(trajectories[4]) + size_of(trajectories[5])
    buffer = trajectory_buffer(10, 32, max_bytes=room)
    buffer.extend(trajectories)
    assert len(buffer) == 2 and set(buffer.sample()["request"].tolist()) == {4, 5}
    tight = trajectory_buffer(10, 32, max_bytes=1)
    for trajectory in trajectories:
        tight.extend([trajectory])
        assert len(tight) == 1  # the newest, whatever its size
    tight.add(trajectories[0])
    assert set(tight.sample()["request"].tolist()) == {0}


def test_what_is_removed_leaves_room(trajectories: list[TensorDict]) -> None:
    buffer = trajectory_buffer(10, 32, max_bytes=sum(map(size_of, trajectories)))
    buffer.extend(trajectories)
    storage = buffer.storage
    assert isinstance(storage, NewestTrajectories)
    assert storage.of_requests({1, 3, 9}) == [trajectories[1], trajectories[3]]
    storage.remove([trajectories[1], trajectories[3]])
    assert set(buffer.sample()["request"].tolist()) == {0, 2, 4, 5}
    buffer.extend([trajectories[1]])
    assert len(buffer) == 5


def test_a_state_keeps_what_the_collector_noted(trajectories: list[TensorDict]) -> None:
    noted = trajectories[0].copy()
    notes = {"source": "engine-1", "tenant": "a", "captured": 5.0, "seconds": 0.5}
    for name, note in notes.items():
        noted.set_non_tensor(name, note)
    read = of_state(as_state(noted))
    assert {name: read.get_non_tensor(name) for name in notes} == notes
    assert (read.exclude(*notes) == trajectories[0]).all()
    assert set(of_state(as_state(trajectories[0])).keys()) == set(trajectories[0].keys())  # nothing is made up
