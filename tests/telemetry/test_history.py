from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from run_events import gate, request, requests, status, swap, train, verdict, watchdog

from aurora_rl.telemetry.history import (
    GateDecision,
    LearnerFigures,
    Point,
    RunHistory,
    Swap,
    TrialVerdict,
    WatchdogFault,
)
from aurora_rl.telemetry.rates import Rates


def history_of(*events: dict, most: int = 1000) -> RunHistory:
    history = RunHistory(most)
    for event in events:
        history.follow(event)
    return history


def test_a_run_is_what_its_events_say() -> None:
    history = history_of(
        request("code", speculative=(9, 3)),
        request("sql", tokens=4),
        request("code", tokens=2, speculative=(1, 1)),
        {"event": "costs", "time": 1.0, "round_ms": {}},  # is nobody's
        status(3),
        train(),
        gate(),
        swap(3),
        {"event": "trial", "time": 1.0, "version": 2, "against": 1, "requests": 3},
        verdict(version=2),
        watchdog(),
        {"event": "trial", "time": 1.0, "version": 3, "against": 1, "requests": 3},
        {"event": "step_skipped", "time": 1.0, "reason": "loss is nan", "steps": 40, "skipped": 2},
    )
    assert (history.requests, history.version) == (3, 1)
    assert history.points == [Point(103.0, 3, 2.0, Rates(10.0, 15.0, 96, 1.25), Counter(tree=3, baseline=1))]
    assert history.swaps == [Swap(103.0, 3, 1, 2.5)]
    assert history.gates == [GateDecision(100.0, 3, True, 0.0711, (0.01, 0.13), 2.1, 2.03, 1)]
    trial = TrialVerdict(100.0, 40, 2, False, "acceptance length fell", (2.0, 2.5), (30.0, 35.0))
    assert (history.verdicts, history.on_trial) == ([trial], 3)
    assert history.as_json()["verdicts"]["acceptance_length"] == [(2.0, 2.5)]
    found = "tensor 'fc.weight' is all zero"
    assert history.faults == [WatchdogFault(100.0, 40, 1, "corrupted", found, "its weights were loaded again")]
    assert history.learner == LearnerFigures("running", steps=40, seen=32, waiting=2, loss=1.2345, skipped=2)
    code, sql = history.domains["code"], history.domains["sql"]
    assert (code.first, code.requests, code.tokens, code.acceptance) == (0, 2, 10, 2.5)
    assert (sql.first, sql.requests, sql.tokens, sql.acceptance) == (1, 1, 4, 2.0)


def test_trials_at_engines_are_kept_and_end_with_their_learner() -> None:
    began = {"event": "engine_trial", "time": 1.0, "version": 2, "against": 1, "engines": ["a"], "of": 4}
    ended = verdict(event="engine_verdict", version=2, requests=64, published=9, tokens_per_second=None)
    history = history_of(request("code"), began)
    assert history.on_trial == 2
    history.follow(ended)
    history.follow(ended | {"acceptance_length": None, "reason": "its engines are gone"})
    assert history.on_trial is None and [trial.requests for trial in history.verdicts] == [1, 1]
    assert [trial.acceptance_length for trial in history.verdicts] == [(2.0, 2.5), (None, None)]
    assert history.verdicts[0].tokens_per_second == (None, None)
    ready = {"event": "learner_ready", "time": 3.0, "seen": 0}
    history.follow({"event": "trial", "time": 2.0, "version": 3, "against": 1, "requests": 3})
    history.follow(ready)
    assert history.on_trial == 3
    history.follow(began)
    assert history.on_trial == 3  # in this server, and version 2 at other engines
    history.follow(verdict(version=3))
    assert history.on_trial == 2
    history.follow(ready)
    assert history.on_trial is None


def test_requests_of_which_only_sums_are_known_count_as_many() -> None:
    history = history_of(request(speculative=(2, 2)), requests(3), request("code"))
    assert history.requests == 5 and history.domains["code"].first == 4
    unnamed = history.domains[""]
    assert (unnamed.requests, unnamed.tokens, unnamed.acceptance) == (4, 8 + 24, 20 / 11)


def test_clients_requests_move_the_place_where_the_traffic_has_something_new() -> None:
    begin = {"event": "begin", "time": 1.0, "traffic": 4, "unseen": 3}
    history = history_of(begin, request(request=1), request(request=4), request(request=0), requests(1))
    assert history.marks == [(5, "unseen templates")]
    for number in (5, 2, 6, 3):  # the fifth to complete is the last before
        history.follow(request(request=number))
    assert history.marks == [(6, "unseen templates")] and history.requests == 8


def test_a_learner_that_died_and_was_started_again() -> None:
    history = history_of({"event": "learner_died", "time": 1.0, "reason": "the learner died with status -9"})
    assert (history.learner.state, history.learner.restarts) == ("died with status -9", 0)
    history.follow({"event": "learner_restarted", "time": 2.0, "restarts": 1, "resumed": True, "lost": 3})
    history.follow(status(0))
    assert (history.learner.state, history.learner.restarts) == ("running", 1)
    assert history.drops == {"learner_died": 3}


def test_what_is_in_no_checkpoint_is_known_across_learners() -> None:
    history = history_of({"event": "learner_ready", "time": 1.0, "pid": 1, "seen": 0})
    assert history.unsaved(0) == 0 and history.unsaved(3) == 3
    saved = {"event": "checkpoint", "time": 1.0, "steps": 1, "version": 1}
    history.follow({**saved, "seen": 4})
    history.follow({"event": "drops", "time": 1.0, "reasons": {"malformed": 1, "buffer_full": 2}, "steps": 1})
    assert history.unsaved(12) == 5  # of twelve, four are saved and three were dropped
    history.follow({"event": "learner_restarted", "time": 2.0, "restarts": 1, "resumed": True, "lost": 5})
    assert history.unsaved(12) == 0
    for event in ({**saved, "seen": 4}, {"event": "learner_ready", "time": 2.0, "pid": 2, "seen": 4}):  # it goes on
        history.follow(event)
    assert history.unsaved(15) == 3
    history.follow({**saved, "seen": 6})
    assert history.unsaved(15) == 1
    history.follow({"event": "learner_ready", "time": 3.0, "pid": 3, "seen": 0})  # one that begins anew
    history.follow({**saved, "seen": 1})
    assert history.unsaved(15) == 0 and history.unsaved(9) == 0


def test_a_run_that_goes_on_counts_what_it_saves_itself() -> None:
    saved = {"event": "checkpoint", "time": 1.0, "steps": 1, "version": 1}
    history = history_of({**saved, "seen": 40}, {"event": "learner_ready", "time": 1.0, "pid": 1, "seen": 40})
    history.follow({**saved, "seen": 42})
    assert (history.saved, history.published, history.unsaved(5)) == (2, 1, 3)


def test_memory_is_bounded_and_no_round_is_lost() -> None:
    history = history_of(*(event for n in range(500) for event in (status(n), swap(n, n), gate())), most=20)
    for kept in (history.points, history.swaps, history.gates):
        assert 10 <= len(kept) <= 20
    at = [point.requests for point in history.points]
    assert at == sorted(at) and at[-1] == 499
    assert history.swaps[-1].version == 499
    assert sum((point.drafted for point in history.points), Counter()) == Counter(tree=1500, baseline=500)


def test_the_newest_swaps_and_decisions_are_whole() -> None:
    history = RunHistory(most=100)
    for n in range(1000):
        history.follow(swap(n, n))
        history.follow(gate(version=n))
        assert len(history.swaps) <= 100
        newest = list(range(max(n - 19, 0), n + 1))
        assert [swap.version for swap in history.swaps[-20:]] == newest
        assert [decision.version for decision in history.gates[-20:]] == newest


def test_an_idle_server_takes_no_points() -> None:
    idle = [status(7, time=200.0 + n, drafted={"plain": 1} if n < 2 else {}) for n in range(50)]
    history = history_of(status(5), *idle, status(8, drafted={"chain": 4}))
    assert [(point.requests, point.time) for point in history.points] == [(5, 105), (7, 200), (7, 249), (8, 108)]
    assert [point.drafted["plain"] for point in history.points] == [0, 1, 1, 0]
    assert history.drafted == Counter(chain=4)


def test_later_domains_share_a_place() -> None:
    history = history_of(*(request(f"d{n}") for n in range(80)), request("d3"))
    assert len(history.domains) == 51
    assert (history.domains["(others)"].requests, history.domains["d3"].requests) == (30, 2)


def test_the_page_gets_plain_json() -> None:
    short = status(2, baseline_rounds=32, speedup=None, acceptance_length=1.23456789)
    none = status(4, tokens_per_second={"baseline": None, "speculative": 15.0}, speedup=None, baseline_rounds=0)
    history = history_of(request(), short, status(3), none, swap(3), gate(), train())
    told = json.loads(json.dumps(history.as_json(), allow_nan=False))
    assert told["points"] == {
        "time": [102.0, 103.0, 104.0],
        "requests": [2, 3, 4],
        "acceptance": [1.2346, 2.0, 2.0],
        "speedup": [None, 1.5, None],
        "plain": [10.0, 10.0, None],
        "speculative": [15.0, 15.0, 15.0],
        "baseline_rounds": [32, 96, 0],
    }
    assert told["min_baseline_rounds"] == 96
    assert told["drafted"] == {"tree": 0.75, "baseline window": 0.25}
    assert told["swaps"] == {"time": [103.0], "requests": [3], "version": [1], "ms": [2.5]}
    assert (told["gates"]["publish"], told["gates"]["interval"], told["gates"]["requests"]) == (
        [True],
        [[0.01, 0.13]],
        [1],
    )
    assert (told["requests"], told["version"], told["learner"]["loss"]) == (1, 1, 1.2345)
    assert json.loads(json.dumps(RunHistory().as_json()))["version"] is None


@pytest.fixture
def eager_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_threads")
def test_the_page_reads_whole_points_while_the_server_adds_some() -> None:
    history = RunHistory(most=40)
    writer = threading.Thread(target=lambda: [history.follow(status(n)) for n in range(5000)])
    writer.start()
    while writer.is_alive():
        assert len({len(column) for column in history.as_json()["points"].values()}) == 1
    writer.join()
