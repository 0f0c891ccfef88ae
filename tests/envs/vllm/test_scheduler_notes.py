"""What the scheduler's process notes of requests, and when it empties the prefix cache. tests/vllm runs real ones."""

import pickle
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_rl.envs.vllm.scheduler_notes import FLUSH, NOTES, Ended, Notes, SchedulerNotes


@dataclass
class Batch:
    """As much of a scheduler's output as the notes read."""

    scheduled_new_reqs: list[Any] = field(default_factory=list)
    finished_req_ids: set[str] = field(default_factory=set)


class Scheduler:
    """Begins what is in ``new``, ends what is in ``done``, and counts how often its prefix cache was emptied."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.new: list[str] = []
        self.done: set[str] = set()
        self.running: list[str] = []
        self.flushes, self.succeeds = 0, True

    def schedule(self) -> Batch:
        return Batch([SimpleNamespace(req_id=rid) for rid in self.new], self.done)

    def update_from_output(self, batch: Any, output: Any) -> str:
        return "outputs"

    def _free_request(self, request: Any, delay: bool = False) -> bool:
        return delay

    def reset_prefix_cache(self) -> bool:
        self.flushes += 1
        return self.succeeds


@pytest.fixture
def scheduler() -> Any:
    class Hooked(Scheduler):
        pass

    return SchedulerNotes().on_class(lambda config: config, Hooked)()


def test_ends_and_salts_travel_with_the_batch(scheduler: Any) -> None:
    scheduler.requests = {"2": SimpleNamespace(cache_salt="t@x")}
    scheduler.new, scheduler.done = ["2"], {"1", "3"}
    status = SimpleNamespace(name="FINISHED_STOPPED")
    assert scheduler._free_request(SimpleNamespace(request_id="1", output_token_ids=(4, 5), status=status), delay=True)
    batch = pickle.loads(pickle.dumps(scheduler.schedule()))  # to the worker's process
    notes = getattr(batch, NOTES)
    assert notes.ended == {"1": Ended([4, 5], "FINISHED_STOPPED")} and notes.salts == {"2": "t@x"} and not notes.flushed
    scheduler.new, scheduler.done = [], set()
    assert getattr(scheduler.schedule(), NOTES).ended == {}  # told once


def test_a_dump_of_a_batch_has_neither_tokens_nor_salts() -> None:
    notes = Notes({"1": Ended([4711, 4712], "FINISHED_STOPPED")}, {"2": "t@secret"}, flushed=False)
    assert not isinstance(notes, tuple)  # vLLM would print its parts before it looks for this method
    assert notes.anon_repr() == "Notes(ended=1, begun=1, flushed=False)"


def test_the_prefix_cache_is_emptied_when_nothing_runs_and_once(scheduler: Any) -> None:
    scheduler.schedule()
    assert scheduler.flushes == 0
    scheduler.running = ["1"]
    assert scheduler.update_from_output(None, SimpleNamespace(**{FLUSH: True})) == "outputs"
    assert not getattr(scheduler.schedule(), NOTES).flushed and scheduler.flushes == 0
    scheduler.running, scheduler.succeeds = [], False
    assert not getattr(scheduler.schedule(), NOTES).flushed
    scheduler.succeeds = True
    assert getattr(scheduler.schedule(), NOTES).flushed
    scheduler.update_from_output(None, SimpleNamespace())
    assert not getattr(scheduler.schedule(), NOTES).flushed and scheduler.flushes == 2


def test_a_fault_of_ours_stays_ours(scheduler: Any) -> None:
    scheduler.new = ["unknown"]
    assert not hasattr(scheduler.schedule(), NOTES)
    assert scheduler._free_request(object()) is False
