from __future__ import annotations

import io
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from run_events import gate, request, requests, status, train, verdict, watchdog

from aurora_rl.telemetry import view
from aurora_rl.telemetry.history import RunHistory
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.telemetry.rates import Rates
from aurora_rl.telemetry.view import LiveView, every, trend


def serving() -> Any:
    """What the view asks of a server."""
    stats = SimpleNamespace(
        finished=[(10, 5)] * 20,
        version=3,
        swap_ms=[1.0, 2.0],
        rates=lambda share: Rates(10.0, 15.0, 96, 1.25),
        drafted=Counter(tree=3, baseline=1),
        last_acceptance=2.0,
    )
    return SimpleNamespace(stats=stats, depth=2, queued=4, drops=Counter(no_learner=1), sent=9, refused=None)


@pytest.fixture
def run(tmp_path: Path) -> SimpleNamespace:
    log, half = MetricsLog(tmp_path / "m.jsonl", "server"), serving()
    run = SimpleNamespace(log=log, serving=half, learner="running", reader=MetricsReader(tmp_path / "m.jsonl"))
    run.traffic = SimpleNamespace(answered=20, total=40)
    run.view = LiveView(
        half, log, MetricsReader(tmp_path / "m.jsonl"), RunHistory(), traffic=run.traffic, learner=lambda: run.learner
    )
    return run


def write(log: MetricsLog, *events: dict[str, Any]) -> None:
    for event in events:
        log.write(**{name: value for name, value in event.items() if name != "time"})


def shown(run: SimpleNamespace, width: int = 100) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(run.view.table())
    return console.export_text()


def test_the_view_shows_the_run(run: SimpleNamespace) -> None:
    write(run.log, train(), gate(), status(20))
    run.view.follow()
    assert run.view.line() == (
        "requests 20/40 | elapsed · left 0:00:00 · 0:00:00 | acceptance length 2.00 at depth 2"
        " | drafted tree 75% · baseline window 25% | tokens/s plain · speculative 10.0 · 15.0 | speedup 1.50"
        " | version · swaps 3 · 2 | queue · dropped 4 · 1 | learner running | learner loss · skipped steps 1.234 · 0"
        " | gate +0.071 published | trial –"
    )
    text = shown(run)
    assert all(figure in text for figure in ("20/40", "10.0 · 15.0", "+0.071 published"))


def test_the_line_of_a_server_that_idles_comes_once(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    line = run.view.news()
    assert line == run.view.line()
    now = view.time.monotonic()
    monkeypatch.setattr(view.time, "monotonic", lambda: now + 3600)
    assert run.view.line() != line and run.view.news() is None
    run.traffic.answered = 21
    assert run.view.news() == run.view.line()


def test_a_trial_and_its_end_are_shown(run: SimpleNamespace) -> None:
    write(run.log, {"event": "trial", "version": 4, "against": 3, "requests": 20})
    run.view.follow()
    assert run.view.line().endswith(" | trial version 4")
    write(run.log, verdict(version=4))
    run.view.follow()
    assert run.view.line().endswith(" | trial version 4 rolled back: acceptance length fell")
    write(run.log, watchdog())
    run.view.follow()
    assert run.view.line().endswith(" | drafter corrupted: its weights were loaded again")


def test_a_run_that_has_nothing_to_show_yet(run: SimpleNamespace) -> None:
    run.serving.stats.finished, run.serving.stats.last_acceptance, run.traffic.answered = [], None, 0
    run.serving.stats.rates = lambda share: Rates(None, None)
    assert run.view.line().startswith(
        "requests 0/40 | elapsed · left 0:00:00 | acceptance length – at depth 2 | drafted – | tokens/s plain · "
        "speculative – · – | speedup –"
    )
    run.view.log_status()
    (status,) = list(run.reader)
    assert (status["acceptance_length"], status["coverage"], status["acceptance_by_position"]) == (None, None, [])


def test_a_status_is_about_the_time_since_the_last_one(run: SimpleNamespace) -> None:
    write(run.log, request(accepted={0: 6, 1: 1, 2: 3}, coverage=0.5), request(accepted={2: 2}, coverage=0.7))
    run.view.log_status()
    write(run.log, request(accepted={0: 1}, coverage=1.0), requests(2, accepted={1: 1, 3: 2}))
    run.view.log_status()
    run.serving.stats.drafted.update(tree=2)
    run.view.log_status()
    first, second, third = [event for event in list(run.reader) if event["event"] == "status"]
    assert (second["drafted"], third["drafted"]) == ({}, {"tree": 2})
    assert first["acceptance_by_position"] == [0.5, round(5 / 12, 4)]
    assert first["coverage"] == pytest.approx(0.6)
    assert (second["acceptance_by_position"], second["coverage"]) == ([0.75, 0.5, 0.5], 1.0)
    for name in ("time", "acceptance_by_position", "coverage"):
        first.pop(name)
    assert first == {
        "source": "server",
        "event": "status",
        "requests": 20,
        "version": 3,
        "acceptance_length": 2.0,
        "tokens_per_second": {"baseline": 10.0, "speculative": 15.0},
        "speedup": 1.5,
        "baseline_rounds": 96,
        "break_even": 1.25,
        "drafted": {"tree": 3, "baseline": 1},
        "depth": 2,
        "staleness": None,
        "queue": 4,
        "dropped": {"no_learner": 1},
        "learner": "running",
    }


def test_a_status_says_how_clients_fare_what_is_stale_and_what_was_lost(run: SimpleNamespace) -> None:
    waits = [{"time_to_first_token": 0.25}, {}]
    run.view = LiveView(
        run.serving, run.log, MetricsReader(run.log.path), RunHistory(), traffic=None, learner=lambda: run.learner,
        clients=lambda: {"running": 2, "waiting": 1, "waits": waits.pop(0)},
    )  # fmt: skip
    write(run.log, gate(version=5), {"event": "drops", "reasons": {"malformed": 2, "no_learner": 1}, "steps": 0})
    run.view.log_status()
    write(run.log, {"event": "drops", "reasons": {"malformed": 1}, "steps": 0})  # without a step that was taken
    run.view.log_status()
    first, second = [event for event in run.reader if event["event"] == "status"]
    assert first["dropped"] == {"no_learner": 2, "malformed": 2} and second["dropped"]["malformed"] == 3
    assert (first["staleness"], first["running"], first["waiting"]) == (2, 2, 1)
    assert (first["waits"], second["waits"]) == ({"time_to_first_token": 0.25}, {})
    assert "queue · dropped 4 · 5" in run.view.line()


def test_what_goes_wrong_is_told_and_logged_once(run: SimpleNamespace) -> None:
    assert run.view.follow() == []
    run.serving.refused = "handshake mismatch: x"
    run.learner = "died with status -9, serving goes on"
    assert run.view.follow() == ["handshake mismatch: x", "the learner died with status -9, serving goes on"]
    assert run.view.follow() == []
    assert "learner handshake mismatch: x" in run.view.line()
    events = [(event["event"], event["reason"]) for event in list(run.reader)]
    assert events == [
        ("refused", "handshake mismatch: x"),
        ("learner_died", "the learner died with status -9, serving goes on"),
    ]


def test_each_death_of_a_learner_is_told(run: SimpleNamespace) -> None:
    for _ in range(2):
        run.learner = "died with status -9, serving goes on"
        assert run.view.follow() == ["the learner died with status -9, serving goes on"]
        assert run.view.follow() == []
        run.learner = "running"
        assert run.view.follow() == []
    assert [event["event"] for event in run.reader] == ["learner_died"] * 2


def test_a_skipped_step_is_told_once_and_counted(run: SimpleNamespace) -> None:
    for skipped in (1, 2):
        run.log.write("step_skipped", reason="loss is nan", steps=5, skipped=skipped)
    assert run.view.follow() == ["the learner skipped a step, and goes on: loss is nan"]
    run.log.write("step_skipped", reason="loss is inf", steps=5, skipped=3)
    assert run.view.follow() == []
    assert "learner loss · skipped steps – · 3" in run.view.line()


def test_what_the_learner_cannot_write_is_told_once(run: SimpleNamespace) -> None:
    for _ in range(2):
        run.log.write("not_written", what="the training state", reason="No space left on device")
    assert run.view.follow() == ["the learner could not write the training state, and goes on: No space left on device"]


def test_each_thing_that_the_learner_cannot_write_is_told(run: SimpleNamespace) -> None:
    for what in ("a trajectory", "the training state", "a trajectory", "the training state"):
        run.log.write("not_written", what=what, reason="full")
    state = "the learner could not write the training state, and goes on: full"
    assert run.view.follow() == ["the learner could not write a trajectory, and goes on: full", state]
    run.log.write("checkpoint", seen=8, steps=3, version=1)
    for what in ("a trajectory", "the training state"):
        run.log.write("not_written", what=what, reason="full")
    assert run.view.follow() == [state]  # the next failure after one that was written is news


def test_a_training_state_that_was_not_written_is_remembered_until_one_is(run: SimpleNamespace) -> None:
    run.log.write("not_written", what="a trajectory", reason="full")
    run.view.follow()
    assert run.view.unsaved is None
    run.log.write("not_written", what="the training state", reason="full")
    run.view.follow()
    assert run.view.unsaved == "full"
    run.log.write("checkpoint", seen=8, steps=3, version=1)
    run.view.follow()
    assert run.view.unsaved is None


@pytest.mark.parametrize("width", [40, 60, 75])
def test_a_narrow_terminal_wraps_and_cuts_nothing(run: SimpleNamespace, width: int) -> None:
    run.learner = "any at tcp://127.0.0.1:5556"
    write(run.log, status(4, drafted={"tree": 88, "baseline": 12}, acceptance_length=1.0), status(20))
    run.view.follow()
    lines = shown(run, width).splitlines()[1:]
    assert {len(line) for line in lines} == {width}
    cells = [line[1:-1].split("│") for line in lines[1:-1]]
    for column in (0, 1):
        words = "".join(cell[column].strip() for cell in cells).replace(" ", "")
        for name, value in run.view._rows():
            assert (name, value)[column].replace(" ", "") in words


def test_the_table_keeps_its_width(run: SimpleNamespace) -> None:
    before = shown(run).splitlines()[1:]
    write(run.log, status(20))  # what is drafted is a longer text
    run.view.follow()
    after = shown(run).splitlines()[1:]
    assert {len(line) for line in before} == {len(line) for line in after} == {75}


def test_text_of_peers_is_no_markup(run: SimpleNamespace) -> None:
    run.serving.refused = "target is [/x] [bold]"
    assert "target is [/x] [bold]" in shown(run)


def test_a_peer_whose_message_changes_all_the_time_fills_no_memory(run: SimpleNamespace) -> None:
    for number in range(1000):
        run.serving.refused = f"handshake mismatch: {number}"
        assert run.view.follow() == [f"handshake mismatch: {number}"]
    assert len(run.view._told) <= 100


def test_a_speedup_over_one_window_is_too_short(run: SimpleNamespace) -> None:
    run.serving.stats.rates = lambda share: Rates(10.0, 15.0, 32)
    assert "| speedup too short |" in run.view.line()


def test_followers_get_every_event_of_both_processes(run: SimpleNamespace) -> None:
    seen: list[str] = []
    view = LiveView(
        run.serving, run.log, run.reader, RunHistory(), traffic=None, learner=lambda: "running",
        followers=[lambda event: seen.append(event["event"])],
    )  # fmt: skip
    run.log.write("swap", version=1, ms=1.0, requests=3)
    write(MetricsLog(run.log.path, "learner"), train())
    view.follow()
    assert seen == ["swap", "train"]


def test_elapsed_and_remaining_time(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    monkeypatch.setattr(view.time, "monotonic", lambda: began + 90.4)
    assert "| elapsed · left 0:01:30 · 0:01:30 |" in run.view.line()  # 20 of 40
    run.traffic.answered = 15  # five were of clients, who are no part of what is left
    assert run.view.line().startswith("requests 15/40 · 5 of clients | elapsed · left 0:01:30 · 0:02:31 |")
    endless = LiveView(run.serving, run.log, run.reader, RunHistory(), traffic=None, learner=lambda: "running")
    monkeypatch.setattr(view.time, "monotonic", lambda: began + 3815.4)
    assert "requests 20 | elapsed 1:02:05 |" in endless.line()


def test_a_terminal_shows_how_it_went_so_far(run: SimpleNamespace) -> None:
    assert "▁" not in shown(run)
    short = status(4, acceptance_length=1.25, speedup=None, baseline_rounds=32)
    write(run.log, short, status(8), status(12, acceptance_length=1.75))
    run.view.follow()
    assert "▁█▆ 1.25–2.00" in shown(run)
    assert "│  ▁▁ 1.50–1.50" in shown(run)  # a gap, where the speedup was measured too shortly
    assert "▁" not in run.view.line()


def test_a_long_trend_is_of_means() -> None:
    assert trend([1.0, 3.0] * 24 + [9.0, None], width=5) == "▁▁▁▁█ 2.00–2.78"
    assert trend([None, 1.0]) == trend([]) == ""


def test_every() -> None:
    calls: list[int] = []
    tick = every(0.05, lambda: calls.append(1))
    for _ in range(3):
        tick()
    assert calls == []
    time.sleep(0.06)
    tick()
    tick()
    assert calls == [1]
