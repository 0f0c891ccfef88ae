"""`aurora-rl learn`: what keeps it from starting."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from aurora_rl.cli import main as cli
from aurora_rl.training.learner import Learner
from aurora_rl.training.states import check_state, states


def test_learn_with_a_port_in_use(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = next(a.partition("=")[2] for a in arguments if a.startswith("wire.weights"))
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        assert cli.main(["learn", *arguments]) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"aurora-rl: {address} is in use;")
    assert "set wire.weights to another address" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_training_state_within_ten_seconds_of_the_step_under_way(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    came: list[float] = []

    def step(learner: Learner) -> None:
        assert not came, "the signal did not end the learner"
        os.kill(os.getpid(), number)
        came.append(time.monotonic())

    monkeypatch.setattr(Learner, "step", step)
    inherited = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and is to stay so
    try:
        assert cli.main(["learn", *arguments, "checkpoint.buffer=true"]) == 0
    finally:
        signal.signal(number, inherited)
    (state,) = states(tmp_path / "run" / "learner")
    check_state(state)
    assert len(came) == 1 and time.monotonic() - came[0] < 10 and (state / "stream.pt").exists()


def test_a_last_training_state_that_is_not_written_is_no_error_of_the_users(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("aurora_rl.training.learner.save_training_state", full)
    monkeypatch.setattr(Learner, "step", lambda learner: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["learn", *arguments]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "aurora-rl: the training state could not be written: the disk is full"
    )


def test_an_error_of_the_program_leaves_its_traceback_in_the_folder_that_the_run_chose(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(learner: Learner) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Learner, "step", fail)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["learn", *arguments, "run_dir=null"]) == 1
    (run,) = (tmp_path / "runs").iterdir()
    path = run.relative_to(tmp_path) / "learn-traceback.txt"
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"a bug; the traceback is in {path}")
    assert 'raise ValueError("a bug")' in (tmp_path / path).read_text()
