"""A flywheel that is interrupted, killed, or loses its learner."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aurora_rl.checkpoints import read_folder

pytestmark = pytest.mark.faults

Start = Callable[..., Any]
FILES = {"config.yaml", "metrics.jsonl", "report.png", "summary.json"}
ENDLESS = "traffic.requests=5000"


def wait(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def check_interrupted(flywheel: Any, *, serving: bool) -> None:
    assert flywheel.ended() == 130, flywheel.text
    assert flywheel.children == []
    assert {path.name for path in flywheel.run.iterdir()} >= FILES | ({"drafter"} if serving else set())
    assert (flywheel.run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in flywheel.text
    assert flywheel.summary["failed"] == 0


def test_ctrl_c_before_anything_is_loaded(start: Start) -> None:
    flywheel = start("flywheel", ENDLESS)
    wait((flywheel.run / "metrics.jsonl").exists)
    flywheel.interrupt()
    check_interrupted(flywheel, serving=False)
    assert flywheel.summary["requests"] == 0


def test_ctrl_c_while_both_processes_start(start: Start) -> None:
    flywheel = start("flywheel", ENDLESS)
    wait(lambda: flywheel.children)
    flywheel.interrupt()
    check_interrupted(flywheel, serving=False)
    assert flywheel.summary["requests"] == 0


def test_ctrl_c_while_serving_and_again_and_again_while_it_ends(start: Start) -> None:
    flywheel = start("flywheel", ENDLESS)
    flywheel.wait_for("train")
    while flywheel.process.poll() is None:
        flywheel.interrupt()
        time.sleep(0.1)
    check_interrupted(flywheel, serving=True)
    assert flywheel.summary["requests"] > 0
    (over,) = flywheel.events("learner_done")
    assert read_folder(flywheel.run / "learner", "progress.json")[1]["steps"] == over["steps"] > 0


@pytest.mark.parametrize("when", ["starting", "serving"])
def test_a_killed_flywheel_leaves_no_learner(start: Start, when: str) -> None:
    flywheel = start("flywheel", ENDLESS)
    if when == "starting":
        wait(lambda: flywheel.children)
    else:
        flywheel.wait_for("train")
    flywheel.process.kill()
    wait(lambda: not flywheel.children, seconds=15)
    if when == "serving":  # and what it learned is kept
        (over,) = flywheel.events("learner_done")
        assert read_folder(flywheel.run / "learner", "progress.json")[1]["steps"] == over["steps"] > 0


def test_a_killed_learner_does_not_stop_serving(start: Start) -> None:
    flywheel = start("flywheel", "traffic.requests=60", "wire.queue=4")
    flywheel.wait_for("train")
    (learner,) = flywheel.children
    os.kill(learner, signal.SIGKILL)
    assert flywheel.ended() == 0, flywheel.text
    assert flywheel.children == []
    assert "the learner died with status -9, serving goes on" in flywheel.text
    assert len(flywheel.events("learner_died")) == 1
    assert sorted(event["request"] for event in flywheel.events("request")) == list(range(60))
    summary = flywheel.summary
    assert (summary["requests"], summary["failed"]) == (60, 0)
    assert summary["dropped_trajectories"] > 0
    assert {path.name for path in flywheel.run.iterdir()} >= FILES | {"drafter"}


def test_a_port_in_use_is_told_before_a_request_is_served(start: Start, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = f"tcp://127.0.0.1:{holder.getsockname()[1]}"
        flywheel = start("flywheel", f"wire.trajectories={address}")
        assert flywheel.ended() == 2
    errors = [line for line in flywheel.text.splitlines() if line.startswith("aurora-rl: ")]
    assert len(errors) == 1
    assert f"the learner did not start: {address} is in use;" in errors[0]
    assert "set wire.trajectories to another address" in errors[0]
    assert flywheel.events("request") == []
    assert flywheel.children == []
    assert not (flywheel.run / "summary.json").exists()
