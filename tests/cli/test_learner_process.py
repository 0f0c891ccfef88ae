"""The learner of a flywheel as a process: started, waited for and ended."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_rl.cli import learner_process
from aurora_rl.cli.config import load_config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.learner_process import LearnerProcess
from aurora_rl.telemetry.log import MetricsReader


def test_a_learner_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "learner.log").write_text("loading\naurora-rl: tcp://here is in use\n")
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"]) as child:
        with pytest.raises(ConfigError, match="^the learner did not start: tcp://here is in use$"):
            LearnerProcess(child, tmp_path / "learner.log").wait_ready(MetricsReader(tmp_path / "metrics.jsonl"))


def test_a_file_of_the_working_directory_does_not_shadow_a_module_in_the_learner(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "profile.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "aurora_rl").mkdir()
    (tmp_path / "aurora_rl" / "__init__.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    learner = LearnerProcess.start(load_config(overrides=arguments), tmp_path / "run")
    try:
        learner.wait_ready(MetricsReader(tmp_path / "run" / "metrics.jsonl"))
    finally:
        learner.end()
    assert learner.child.returncode == 0


def test_a_child_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_process, "_END_S", 0.2)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert (
            LearnerProcess(child, Path("r/learner.log")).end()
            == "the learner did not end within 0 s and was killed; see r/learner.log"
        )
        assert child.returncode == -signal.SIGKILL
    assert LearnerProcess(child, Path("r/learner.log")).end() is None  # nothing to do any more


def test_the_log_of_a_refused_run_stays_if_the_learner_ended_by_itself(tmp_path: Path) -> None:
    log = tmp_path / "learner.log"
    log.write_text("earlier\nlearning\n")
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as child:
        LearnerProcess(child, log, len("earlier\n")).withdraw()
        assert child.returncode == -signal.SIGTERM and log.read_text() == "earlier\n"
    log.write_text("earlier\naurora-rl: refused\n")
    LearnerProcess(child, log, len("earlier\n")).withdraw()
    assert log.read_text() == "earlier\naurora-rl: refused\n"


def test_the_state_of_the_learner() -> None:
    running: Any = SimpleNamespace(poll=lambda: None)
    assert LearnerProcess(running, Path("r/learner.log")).state == "running"
    dead: Any = SimpleNamespace(poll=lambda: -9, returncode=-9)
    assert (
        "died with status -9, serving goes on; see r/learner.log" in LearnerProcess(dead, Path("r/learner.log")).state
    )
