"""What the assembler drops when a tenant's data is deleted: what requests left that ended or have begun."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from attach_fields import FIELDS
from tensordict import TensorDict

from aurora_rl.envs.remote.assembler import TrajectoryAssembler
from aurora_rl.envs.remote.recorded_totals import RecordedTotals
from aurora_rl.envs.remote.session import Session
from aurora_rl.sampling_params import SamplingParams
from aurora_rl.tenants import joint_salt, tenant_of_salt

Emitted = list[tuple[int, str | None]]


@pytest.fixture
def emitted() -> Emitted:
    return []


@pytest.fixture
def assembler(emitted: Emitted) -> TrajectoryAssembler:
    def emit(trajectory: TensorDict, tenant: str | None, seconds: float) -> None:
        assert 0 < seconds < 60  # from the request's first batch to its end
        emitted.append((int(trajectory["request"]), tenant))

    return TrajectoryAssembler(emit, max_bytes=1 << 20, store_bytes=1 << 20)


def begin(assembler: TrajectoryAssembler, request: int, tenant: str | None) -> None:
    """A prompt of three tokens, of which the first is the request's own."""
    assert assembler.begin(str(request), [request, 1, 2], 0, 0, SamplingParams(), tenant)
    assembler.prompt(str(request), torch.zeros(3, 4), {"hidden": torch.zeros(1, 2)})


def end(assembler: TrajectoryAssembler, request: int) -> None:
    """One token came, by no round."""
    assembler.finish(str(request), [5], terminated=True)


def test_requests_that_have_begun_leave_nothing_and_later_ones_do(
    assembler: TrajectoryAssembler, emitted: Emitted
) -> None:
    for request, tenant in enumerate(("a", "b", None)):
        begin(assembler, request, tenant)
    end(assembler, 1)
    assembler.delete("a")
    for request in (0, 2):
        end(assembler, request)
    time.sleep(0.002)
    begin(assembler, 3, "a")
    end(assembler, 3)
    assembler.close()
    assert emitted == [(1, "b"), (2, None), (3, "a")] and assembler.counts["deleted"] == 1
    assert assembler.counts["recorded"] == 3


def test_features_of_a_tenants_texts_are_dropped_and_of_no_others(assembler: TrajectoryAssembler) -> None:
    for request, tenant in ((6, "a"), (7, "b")):
        begin(assembler, request, tenant)
        end(assembler, request)
    assembler.delete("a")
    assembler.close()
    found = [assembler._store.get(torch.tensor([request, 1, 2])) is not None for request in (6, 7)]
    assert found == [False, True] and not assembler._records


def test_a_session_deletes_from_its_queue_and_bounds_the_age_of_what_waits() -> None:
    session = Session({**FIELDS, "max_age": 60}, engine="SGLang", exact=True)
    forever = Session(FIELDS, engine="SGLang", exact=True)
    try:
        assert (session.sink._max_age, forever.sink._max_age) == (60, float("inf"))
        session.flush_due = False
        for tenant in ("a", "b"):
            session.sink.extend(TensorDict({"x": torch.zeros(2)}), tenant)
        assert session.delete("a") == {"trajectories": 1, "learner": "absent"}
        assert session.sink.queued == 1 and session.flush_due
    finally:
        session.close()
        forever.close()


# ---- a deletion, and the trajectory of a request that has just ended ------------------------------------------------


@pytest.fixture
def session() -> Iterator[Session]:
    session = Session(FIELDS, engine="SGLang", exact=True)
    yield session
    session.sink.close(0.0)  # there is no learner to wait for
    session.close()


def test_a_deletion_waits_for_what_is_on_its_way_into_the_queue(session: Session) -> None:
    assembler, lock, emit = session.assembler, threading.Lock(), session.assembler._emit
    sending, arrived, go_on = (threading.Event() for _ in range(3))

    class Lock:
        """Says that the deletion is there before it waits."""

        def __enter__(self) -> None:
            if not lock.acquire(blocking=False):
                arrived.set()
                lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    def held_up(trajectory: TensorDict, tenant: str | None, seconds: float) -> None:
        sending.set()
        assert go_on.wait(10)
        emit(trajectory, tenant, seconds)

    assembler._emitting, assembler._emit = Lock(), held_up  # type: ignore[assignment]
    begin(assembler, 1, "a")
    end(assembler, 1)
    assert sending.wait(10)
    with ThreadPoolExecutor(1) as pool:
        deletion = pool.submit(session.delete, "a")
        deletion.add_done_callback(lambda _: arrived.set())
        came = arrived.wait(10)
        go_on.set()
        assert came and deletion.result(10) == {"trajectories": 1, "learner": "absent"}
    assembler.close()
    assert session.sink.queued == 0


def test_what_was_to_stay_is_dropped_if_it_is_deleted_before_it_is_queued(session: Session) -> None:
    assembler, checked, go_on = session.assembler, threading.Event(), threading.Event()

    class Sums:
        def plus(self, *_: object) -> RecordedTotals:
            # After the last look whether the request is deleted, but for the lock's.
            checked.set()
            assert go_on.wait(10)
            return RecordedTotals()

    sums: Any = Sums()
    assembler.totals = sums
    begin(assembler, 1, "a")
    end(assembler, 1)
    came = checked.wait(10)
    deleted = session.delete("a")
    go_on.set()
    assert came and deleted == {"trajectories": 0, "learner": "absent"}
    assembler.close()
    assert session.sink.queued == 0


@pytest.mark.parametrize("tenant", ["a", None])
@pytest.mark.parametrize("salt", [None, "x", "b@x"])
def test_the_tenant_is_read_from_the_salt_that_our_front_sets(tenant: str | None, salt: str | None) -> None:
    assert tenant_of_salt(joint_salt(tenant, salt)) == tenant
