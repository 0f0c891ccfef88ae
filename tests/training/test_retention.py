"""What a learner keeps, and until when: deletion of a tenant's data, ages, and one step a trajectory."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from learner_loops import Make, drain, send, step_until
from tensordict import TensorDict

from aurora_rl.training.retention import AgeLimit


def of_tenant(loop: SimpleNamespace, trajectories: list[TensorDict], tenant: str) -> None:
    """Send trajectories of a tenant, and let the learner take them."""
    extend = loop.sink.extend
    loop.sink.extend = lambda trajectory: extend(trajectory, tenant)
    try:
        send(loop, trajectories)
    finally:
        loop.sink.extend = extend
    drain(loop)


def kept(loop: SimpleNamespace) -> list[int]:
    """The requests of all trajectories that a learner has."""
    learner = loop.learner
    buffered = [int(each["request"]) for each in learner._buffer.storage._storage]
    held = [int(each["request"]) for each in learner._gate._held]
    assert {int(each["request"]) for each in learner._new} <= set(buffered)
    return sorted(buffered + held)


def test_a_deletion_takes_a_tenants_trajectories_from_wherever_they_are(make: Make, served: list[TensorDict]) -> None:
    loop = make(gate=6, batch_size=2, replay=3)
    of_tenant(loop, served[:2], "a")  # learned from
    of_tenant(loop, served[2:4], "b")
    of_tenant(loop, served[4:5], "a")  # waits for a second
    loop.learner._gate.hold()
    of_tenant(loop, served[5:7], "a")
    of_tenant(loop, served[7:8], "b")
    assert kept(loop) == list(range(8)) and len(loop.learner._new) == 1 and loop.learner._sound is not None
    loop.sink.delete("a")
    step_until(loop, lambda: loop.events("deleted"))
    assert kept(loop) == [2, 3, 7] and not loop.learner._new
    (event,) = loop.events("deleted")
    assert (event["tenants"], event["trajectories"]) == (1, 5) and "a" not in event.values()

    # Told again, as to a learner that was away, it leaves what came since.
    of_tenant(loop, served[8:10], "a")
    loop.sink._untold = dict(loop.sink._deletions)
    loop.sink.extend(served[10])
    step_until(loop, lambda: len(loop.events("deleted")) == 2)
    drain(loop)
    assert kept(loop) == [2, 3, 7, 8, 9, 10] and loop.events("deleted")[1]["trajectories"] == 0


def test_what_is_deleted_is_not_replayed_even_if_nothing_else_is_there(make: Make, served: list[TensorDict]) -> None:
    loop = make(batch_size=2, replay=500)
    for trajectory in served[:2]:
        loop.sink.extend(trajectory, "a")
    step_until(loop, lambda: loop.learner.steps == 1)
    loop.sink.delete("a")
    step_until(loop, lambda: loop.events("deleted"))
    drain(loop)
    assert kept(loop) == [] and loop.learner.steps < 500


def test_what_is_too_old_is_neither_kept_nor_learned_from(
    make: Make, served: list[TensorDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aurora_rl.training.wire_notes._NOTE_S", 0.0)
    loop, ahead = make(batch_size=2, replay=1, max_age=3600.0), [0.0]
    loop.learner._age_limit = AgeLimit(3600.0, lambda: time.time() + ahead[0])
    send(loop, served[:3])
    drain(loop)
    assert kept(loop) == [0, 1, 2]
    ahead[0] = 1800.0
    drain(loop)
    assert kept(loop) == [0, 1, 2]
    ahead[0] = 3601.0
    step_until(loop, lambda: not kept(loop))
    send(loop, served[3:5])  # too old already when it comes
    drain(loop)
    assert kept(loop) == [] and loop.learner.seen == 2
    assert sum(event["reasons"].get("expired", 0) for event in loop.events("drops")) == 3  # not learned from


@pytest.mark.parametrize("seconds", [0.5, 60.0, 86400.0])
def test_nothing_older_is_left_between_two_looks(seconds: float) -> None:
    now = 1000.0
    limit, kept = AgeLimit(seconds, lambda: now), [TensorDict().set_non_tensor("captured", 1000.0)]
    for _ in range(1200):
        if limit.due():
            kept = [each for each in kept if not limit.passed(each)]
        assert not kept or now - 1000.0 < seconds
        assert kept or now - 1000.0 > seconds - max(0.02 * seconds, 0.001)
        if not kept:
            break
        now += seconds / 1000
    assert not kept
    now -= 10 * seconds  # the clock is set back
    assert limit.due() and not limit.due()
    forever = AgeLimit(None)
    assert not forever.due() and not forever.passed(TensorDict().set_non_tensor("captured", -1e9))


def test_with_one_step_a_trajectory_nothing_is_kept_after_it(make: Make, served: list[TensorDict]) -> None:
    loop = make(batch_size=2, replay=0, once=True, gate=2)
    send(loop, served[:3])
    step_until(loop, lambda: loop.learner.steps == 1)
    assert kept(loop) == [2] and loop.learner._sound is None
    loop.learner._gate.hold()
    send(loop, served[3:5])
    step_until(loop, lambda: loop.learner.steps == 2)
    drain(loop)
    assert sorted(sum(loop.loss.batches, [])) == [0, 1, 2, 3] and kept(loop) == [4]
    loop.loss.poison = lambda drafter: drafter.fc.weight.sum() * float("nan")
    send(loop, served[5:6])
    step_until(loop, lambda: loop.learner.skipped == 1)
    assert kept(loop) == [] and loop.events("step_skipped")
