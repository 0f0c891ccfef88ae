"""The learner of a flywheel as a process: started, waited for and ended."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_rl.cli import learner_process
from aurora_rl.cli.config import Config, load_config
from aurora_rl.cli.errors import ConfigError, may_pass
from aurora_rl.cli.learner_process import LearnerProcess
from aurora_rl.telemetry.log import MetricsReader
from aurora_rl.training.states import add_state, states

Handle = Callable[[Any, Path], LearnerProcess]


@pytest.fixture
def learner_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Path], LearnerProcess]:
    """Makes the handle of a process that was started otherwise."""

    def handle(child: Any, run_dir: Path) -> LearnerProcess:
        with monkeypatch.context() as patch:
            patch.setattr(LearnerProcess, "_start", lambda self, config: child)
            return LearnerProcess(load_config(), run_dir)

    return handle


def test_a_learner_that_does_not_start_is_quoted(tmp_path: Path, learner_of: Handle) -> None:
    (tmp_path / "learner.log").write_text("loading\naurora-rl: tcp://here is in use\n")
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"]) as child:
        with pytest.raises(ConfigError, match="^the learner did not start: tcp://here is in use$"):
            learner_of(child, tmp_path).wait_ready(MetricsReader(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("code", "passes"), [("raise SystemExit(75)", True), ("raise SystemExit(2)", False), ("", None)]
)
def test_a_learner_that_may_start_another_time_is_told_apart(
    tmp_path: Path, learner_of: Handle, monkeypatch: pytest.MonkeyPatch, code: str, passes: bool | None
) -> None:
    """By its own status; and one that lives and does not listen in time may listen another time."""
    monkeypatch.setattr(learner_process, "_READY_S", 0.1 if passes is None else 30.0)
    (tmp_path / "learner.log").write_text("aurora-rl: not now\n")
    with subprocess.Popen([sys.executable, "-c", code or "import time; time.sleep(60)"]) as child:
        with pytest.raises(ConfigError, match="^the learner did not start: not now$") as caught:
            learner_of(child, tmp_path).wait_ready(MetricsReader(tmp_path / "metrics.jsonl"))
        child.kill()
    assert may_pass(caught.value) is (passes is not False)


def test_a_child_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch, learner_of: Handle) -> None:
    monkeypatch.setattr(learner_process, "_END_S", 0.2)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert (
            learner_of(child, Path("r")).end() == "the learner did not end within 0 s and was killed; see r/learner.log"
        )
        assert child.returncode == -signal.SIGKILL


def test_the_log_of_a_refused_run_stays_if_the_learner_ended_by_itself(tmp_path: Path, learner_of: Handle) -> None:
    log = tmp_path / "learner.log"
    log.write_text("earlier\n")
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as child:
        learner = learner_of(child, tmp_path)
        log.write_text("earlier\nlearning\n")
        learner.withdraw()
        assert child.returncode == -signal.SIGTERM and log.read_text() == "earlier\n"
    log.write_text("earlier\naurora-rl: refused\n")
    learner.withdraw()
    assert log.read_text() == "earlier\naurora-rl: refused\n"


def test_a_learner_that_dies_is_started_again_after_a_wait_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, started = [100.0], []
    monkeypatch.setattr(learner_process.time, "monotonic", lambda: clock[0])

    def start(self: LearnerProcess, config: Config) -> Any:
        started.append((clock[0], config.learner.resume))
        self._started = clock[0]
        return SimpleNamespace(poll=lambda: 1 if len(started) < 4 else None, returncode=1)

    monkeypatch.setattr(LearnerProcess, "_start", start)
    learner = LearnerProcess(load_config(), tmp_path)
    for _ in range(200):
        if len(started) == 2 and not (tmp_path / "learner").exists():
            add_state(tmp_path / "learner", lambda state: state.mkdir(parents=True), keep=1)  # it has left a checkpoint
        learner.tend()
        clock[0] += 0.125
    waits = [later - earlier for (earlier, _), (later, _) in zip(started, started[1:], strict=False)]
    assert waits == [1.0, 2.125, 4.125]  # one, two and four seconds, to the next look
    assert [resume for _, resume in started] == [None, None, str(tmp_path / "learner"), str(tmp_path / "learner")]
    assert learner.restarts == 3 and not learner.tend() and learner.state == "running"


def test_a_learner_whose_training_states_are_broken_starts_anew_from_what_was_published_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, learner_of: Handle
) -> None:
    clock, started = [100.0], []

    def start(self: LearnerProcess, config: Config) -> Any:
        started.append((config.learner.resume, config.drafter.path))
        return SimpleNamespace(poll=lambda: None)

    learner = learner_of(SimpleNamespace(poll=lambda: -9, returncode=-9), tmp_path)
    monkeypatch.setattr(learner_process.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(LearnerProcess, "_start", start)
    state = add_state(tmp_path / "learner", lambda state: state.mkdir(parents=True), keep=1)
    (state / "manifest.json").write_text("{")
    (tmp_path / "versions" / "4").mkdir(parents=True)
    (tmp_path / "versions" / "4" / "config.json").write_text("{}")
    while not learner.tend():
        clock[0] += 1
    assert started == [(None, str(tmp_path / "versions" / "4"))] and not learner.resumed
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(f"the learner starts anew from {tmp_path}/versions/4, as no training state can be used: ")
    assert "manifest.json cannot be read" in line and states(tmp_path / "learner")


def test_serving_does_not_wait_until_a_large_training_state_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learner_of: Handle
) -> None:
    clock, read = [100.0], threading.Event()
    learner = learner_of(SimpleNamespace(poll=lambda: -9, returncode=-9), tmp_path)
    monkeypatch.setattr(learner_process.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(LearnerProcess, "_start", lambda self, config: SimpleNamespace(poll=lambda: None))
    monkeypatch.setattr(learner_process, "go_on", lambda config, run: (config, [] if read.wait(60) else ["never"]))
    for _ in range(4):  # due after the second
        assert not learner.tend()
        clock[0] += 1
    read.set()
    while not learner.tend():
        pass
    assert learner.restarts == 1


def test_a_learner_that_cannot_be_started_again_is_tried_again_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, learner_of: Handle
) -> None:
    dead: Any = SimpleNamespace(poll=lambda: -9, returncode=-9)
    run, clock, started = tmp_path / "run", [100.0], []
    learner = learner_of(dead, run)  # whose folder is gone
    monkeypatch.setattr(learner_process.time, "monotonic", lambda: clock[0])

    def start(*arguments: Any, **options: Any) -> Any:
        started.append(clock[0])
        if len(started) == 1:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")  # fork
        return SimpleNamespace(poll=lambda: None)

    monkeypatch.setattr(learner_process.subprocess, "Popen", start)
    while not learner.tend():
        clock[0] += 0.125
        if clock[0] == 106.0:
            run.mkdir()
        assert not started or "cannot be started again (Resource temporarily unavailable), serving" in learner.state
        assert clock[0] < 130
    # A second, two and four after the looks that found it dead: two starts without a folder, one without memory.
    assert started == [107.25, 115.375] and learner.restarts == 1 and learner.state == "running"
    told = [record.message for record in caplog.records]
    assert len(told) == 1 and "cannot be started again, serving goes on without it: [Errno 2]" in told[0]


@pytest.mark.parametrize(
    ("status", "told"), [(-9, "the learner ended with status -9: loading; see "), (0, ""), (-signal.SIGTERM, "")]
)
def test_a_death_that_nobody_noticed_is_told_at_the_end_and_another_is_not(
    tmp_path: Path, learner_of: Handle, status: int, told: str
) -> None:
    (tmp_path / "learner.log").write_text("loading\n")
    dead: Any = SimpleNamespace(poll=lambda: status, returncode=status)
    learner = learner_of(dead, tmp_path)
    assert (learner.end() or "").startswith(told) and bool(learner.end()) is bool(told)
    learner.tend()  # which notices
    assert learner.end() is None


def test_the_state_of_the_learner(learner_of: Handle) -> None:
    running: Any = SimpleNamespace(poll=lambda: None)
    assert learner_of(running, Path("r")).state == "running"
    dead: Any = SimpleNamespace(poll=lambda: -9, returncode=-9)
    assert "died with status -9, serving goes on; see r/learner.log" in learner_of(dead, Path("r")).state
