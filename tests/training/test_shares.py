"""Fair shares of a learner's buffer, batches and gate when one engine sends far more than another."""

from __future__ import annotations

import time
from collections import Counter

import torch
from learner_loops import HANDSHAKE, Make, drain, send
from processes import wait
from tensordict import TensorDict

from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.training.replay import NewestTrajectories, trajectory_buffer
from aurora_rl.training.shares import engine_of, in_turns
from aurora_rl.trajectories import size_of


def sent_by(engine: str, trajectory: TensorDict) -> TensorDict:
    return trajectory.copy().set_non_tensor("source", engine)


def flood(served: list[TensorDict], rounds: int, each: int = 20) -> list[TensorDict]:
    """Arrivals of "many" and of "few", which sends one for every 20 of the other."""
    one_round = [sent_by("many", served[i % 40]) for i in range(each)] + [sent_by("few", served[40])]
    return [trajectory.copy() for _ in range(rounds) for trajectory in one_round]


def storage_of(capacity: int, max_bytes: int | None = None) -> NewestTrajectories:
    storage = trajectory_buffer(capacity, 4, max_bytes=max_bytes).storage
    assert isinstance(storage, NewestTrajectories)
    return storage


def engines_in(storage: NewestTrajectories) -> Counter[str]:
    return Counter(engine_of(storage[place]) for place in range(len(storage)))


def test_engines_take_turns_and_each_keeps_its_order() -> None:
    engines = ["a", "b", "a", "c", "a", "b"]
    assert [(engines[turn], turn) for turn in in_turns(engines)] == [
        ("a", 0), ("b", 1), ("c", 3), ("a", 2), ("b", 5), ("a", 4),
    ]  # fmt: skip
    assert in_turns([]) == [] and in_turns(["a"] * 3) == [0, 1, 2]


def test_a_flood_leaves_an_engine_its_share_of_the_buffer(served: list[TensorDict]) -> None:
    storage = storage_of(20)
    storage.set(0, flood(served, rounds=12))
    assert engines_in(storage) == {"many": 10, "few": 10}


def test_a_share_is_of_bytes_where_bytes_are_what_is_full(served: list[TensorDict]) -> None:
    small = served[0]
    large = small.copy()
    large["sequence", "features"] = small["sequence", "features"].repeat(1, 50)
    room = 4 * size_of(large)
    storage = storage_of(1000, room)
    storage.set(0, [sent_by("large", large) for _ in range(4)])
    storage.set(0, [sent_by("small", small) for _ in range(300)])
    held = Counter[str]()
    for place in range(len(storage)):
        held[engine_of(storage[place])] += size_of(storage[place])
    assert held.total() <= room and min(held["large"], held["small"]) > 0.2 * room


def test_what_an_engine_that_has_gone_sent_goes_first(served: list[TensorDict]) -> None:
    storage = storage_of(4)
    storage.set(0, [sent_by("gone", served[i]) for i in range(2)])
    storage.set(0, [sent_by("here", served[i % 40]) for i in range(2 * 4 - 1)])
    assert engines_in(storage) == {"gone": 2, "here": 2}
    storage.set(0, [sent_by("here", served[i % 40]) for i in range(3)])
    assert engines_in(storage) == {"here": 4}


def test_engines_that_send_nothing_any_more_leave_the_newest_and_the_buffer(served: list[TensorDict]) -> None:
    """As after restarts of engines without keys, each under a new name."""
    storage = storage_of(200)
    for name in "abc":
        storage.set(0, [sent_by(name, served[i]) for i in range(50)])
    storage.set(0, [sent_by("d", served[i % 40]) for i in range(8 * 32)])
    assert [engine_of(storage[place]) for place in storage.newest(32)] == ["d"] * 32
    assert storage.newest(32) == list(range(len(storage) - 32, len(storage)))
    assert engines_in(storage) == {"a": 50, "b": 50, "c": 50, "d": 50}  # within 400 they may come back
    storage.set(0, [sent_by("d", served[i % 40]) for i in range(400 + 50 - 8 * 32)])
    assert engines_in(storage) == {"d": 200}


def test_newest_are_those_of_all_where_nothing_of_late_is_left(served: list[TensorDict]) -> None:
    storage = storage_of(200)
    storage.set(0, [sent_by("before", served[0]), *[sent_by("lately", served[1]) for _ in range(16)]])
    assert {engine_of(storage[place]) for place in storage.newest(2)} == {"lately"}
    assert storage.drop(lambda each: engine_of(each) == "lately") == 16
    assert storage.newest(2) == [0]


def test_every_second_batch_has_as_many_of_each_engine(served: list[TensorDict]) -> None:
    buffer = trajectory_buffer(200, 4)
    buffer.extend(flood(served, rounds=8)[:160])  # nothing has gone yet
    storage = buffer.storage
    assert isinstance(storage, NewestTrajectories)
    newest = [engine_of(storage[place]) for place in storage.newest(14)]
    assert Counter(newest) == {"many": 7, "few": 7}
    of_few = torch.tensor([float((buffer.sample()["request"] == 40).float().mean()) for _ in range(200)])
    assert 0.10 < float(of_few.mean()) < 0.20  # in the newest 32 seven, in all 160 seven; 0.044 by arrivals alone


def test_a_flood_leaves_an_engine_its_share_of_the_new_batches(make: Make, served: list[TensorDict]) -> None:
    loop = make(batch_size=2, buffer=40)
    few = TrajectorySink(loop.collector.address, handshake=HANDSHAKE, name="few")
    try:
        send(loop, served[:40])
        for trajectory in served[40:44]:
            few.extend(trajectory)
        wait(lambda: few.sent == 4)
        time.sleep(0.1)  # until all are where one poll finds them
        drain(loop)
    finally:
        few.close()
    assert {40, 41, 42, 43} < {request for batch in loop.loss.batches[:4] for request in batch}
    assert loop.learner.seen == 40  # what the full buffer let go of was of the other engine
    engines = loop.events("engines")[-1]["engines"]
    assert engines["few"] == {"trajectories": 4, "version": 0, "staleness": 0, "drops": {}}
