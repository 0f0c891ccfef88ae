"""A flywheel that is interrupted, killed, or loses its learner."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import alive, wait
from run_events import events

from aurora_rl.cli import main as cli
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.serving.server import InferenceServer
from aurora_rl.storage import read_folder
from aurora_rl.telemetry.log import MetricsReader
from aurora_rl.training.states import states

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("signal_handlers")]

Start = Callable[..., Any]
FILES = {"config.yaml", "metrics.jsonl", "report.png", "summary.json"}
ENDLESS = "traffic.requests=5000"


def check_interrupted(flywheel: Any, *, serving: bool) -> None:
    assert flywheel.ended() == 130, flywheel.text
    assert flywheel.children == []
    assert {path.name for path in flywheel.run.iterdir()} >= FILES | ({"drafter"} if serving else set())
    assert (flywheel.run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in flywheel.text
    assert flywheel.summary["failed"] == 0


def test_ctrl_c_before_anything_is_loaded(start: Start) -> None:
    flywheel = start("flywheel", ENDLESS, fresh=True)
    wait((flywheel.run / "metrics.jsonl").exists)
    flywheel.interrupt()
    check_interrupted(flywheel, serving=False)
    assert flywheel.summary["requests"] == 0


def test_ctrl_c_while_both_processes_start(start: Start) -> None:
    flywheel = start("flywheel", ENDLESS, fresh=True)
    wait(lambda: flywheel.children)
    flywheel.interrupt()
    check_interrupted(flywheel, serving=False)
    assert flywheel.summary["requests"] == 0


def test_ctrl_c_while_serving_and_again_and_again_while_it_ends(start: Start) -> None:
    flywheel = start("flywheel", ENDLESS, "drafter.adaptive=true")
    flywheel.wait_for("train")
    while flywheel.process.poll() is None:
        flywheel.interrupt()
        time.sleep(0.1)
    check_interrupted(flywheel, serving=True)
    assert flywheel.summary["requests"] > 0
    (over,) = flywheel.events("learner_done")
    assert read_folder(states(flywheel.run / "learner")[0], "progress.json")[1]["steps"] == over["steps"] > 0


def test_a_killed_flywheel_leaves_no_learner(start: Start) -> None:
    flywheel = start("flywheel", ENDLESS)
    flywheel.wait_for("train")
    flywheel.process.kill()
    wait(lambda: not flywheel.children)
    (over,) = flywheel.events("learner_done")  # and what it learned is kept
    assert read_folder(states(flywheel.run / "learner")[0], "progress.json")[1]["steps"] == over["steps"] > 0


def test_a_learner_whose_flywheel_is_killed_while_it_starts_ends_too(arguments: list[str], tmp_path: Path) -> None:
    learn = [sys.executable, "-m", "aurora_rl.cli.main", "learn", *arguments, f"run_dir={tmp_path / 'run'}"]
    shell = subprocess.Popen(
        ["sh", "-c", '"$@" --parent $$ & echo $!; wait', "flywheel", *learn], stdout=subprocess.PIPE, text=True
    )
    assert shell.stdout is not None
    pid = int(shell.stdout.readline())
    wait((tmp_path / "run" / "metrics.jsonl").exists)
    assert alive(pid)
    shell.kill()
    shell.wait()
    wait(lambda: not alive(pid))
    shell.stdout.close()
    assert list(MetricsReader(tmp_path / "run" / "metrics.jsonl")) == []  # it never came to listen


def test_a_killed_learner_does_not_stop_serving(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    step, killed = InferenceServer.step, []

    def stepped(server: InferenceServer) -> bool:
        if not killed and events(run, "train"):
            killed.append(events(run, "learner_ready")[0]["pid"])
            os.kill(killed[0], signal.SIGKILL)
        time.sleep(0.01)  # so that the end comes after the death was noticed
        return step(server)

    monkeypatch.setattr(InferenceServer, "step", stepped)
    pairs = ["traffic.requests=60", "wire.queue=4", f"run_dir={run}"]
    assert cli.main(["flywheel", *arguments, *pairs]) == 0
    assert not alive(killed[0])
    assert "the learner died with status -9, serving goes on" in " ".join(capsys.readouterr().out.split())
    assert len(events(run, "learner_died")) == 1
    assert sorted(event["request"] for event in events(run, "request")) == list(range(60))
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["requests"], summary["failed"]) == (60, 0)
    assert summary["dropped_trajectories"] >= summary["dropped_by_reason"]["no_learner"] > 0
    assert {path.name for path in run.iterdir()} >= FILES | {"drafter"}


def test_a_port_in_use_is_told_before_a_request_is_served(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = f"tcp://127.0.0.1:{holder.getsockname()[1]}"
        assert cli.main(["flywheel", *arguments, f"wire.trajectories={address}", f"run_dir={run}"]) == 75
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"aurora-rl: the learner did not start: {address} is in use;")
    assert "set wire.trajectories to another address" in error
    assert "request" not in {event["event"] for event in MetricsReader(run / "metrics.jsonl")}
    assert not (run / "summary.json").exists()


def test_several_objectives_on_sampled_trees_learn_and_what_arrives_is_recorded(start: Start, tmp_path: Path) -> None:
    flywheel = start(
        "flywheel", "traffic.requests=24", "temperature=1.0", "drafter.mode=sampled", "drafter.name=eagle3",
        "drafter.num_nodes=8", f"learner.recording={tmp_path / 'stream'}",
        "objectives=[{name: imitation}, {name: acceptance_reward, baseline: leave_one_out, clip: 0.2}]",
    )  # fmt: skip
    assert flywheel.ended() == 0, flywheel.text
    trained = flywheel.events("train")
    assert trained and {"loss_imitation", "loss_acceptance_reward", "expected_accepted"} <= set(
        trained[-1]["objectives"]
    )
    recorded = TrajectoryDataset(tmp_path / "stream")
    assert len(recorded) and all(int(t["sampling", "draft_mode"]) == 1 for t in recorded)
    assert flywheel.summary["requests"] == 24 and flywheel.summary["failed"] == 0


def test_a_learner_that_diverges_says_so_and_serving_goes_on(start: Start) -> None:
    flywheel = start("flywheel", ENDLESS, "learner.muon_lr=1e38", "learner.max_skipped=2")
    flywheel.wait_for("learner_died")
    served = len(flywheel.events("request"))
    flywheel.wait_for("request", served + 5)
    flywheel.interrupt()
    assert flywheel.ended() == 130, flywheel.text
    assert len(flywheel.events("step_skipped")) == 3
    assert "3 steps in a row had no finite loss and gradient" in (flywheel.run / "learner.log").read_text()
    assert flywheel.summary["failed"] == 0


def test_a_hangup_ends_a_run_in_good_order(start: Start) -> None:
    flywheel = start("flywheel", ENDLESS)
    flywheel.wait_for("train")
    flywheel.process.send_signal(signal.SIGHUP)
    check_interrupted(flywheel, serving=True)
    assert flywheel.events("learner_done")


@pytest.mark.parametrize("end", [pytest.param("saved", marks=pytest.mark.stress), "killed"])
def test_a_training_state_that_was_not_written_is_told_unless_a_later_one_was(start: Start, end: str) -> None:
    flywheel = start("flywheel", ENDLESS)
    (ready,) = flywheel.wait_for("learner_ready")
    (flywheel.run / "learner").touch()  # where the folder of states is to be
    flywheel.wait_for("not_written")
    wait(lambda: "the learner could not write the training state, and goes on" in " ".join(flywheel.text.split()))
    if end == "saved":
        (flywheel.run / "learner").unlink()
    else:
        os.kill(ready["pid"], signal.SIGKILL)
        flywheel.wait_for("learner_died")
    flywheel.interrupt()
    assert flywheel.ended() == (130 if end == "saved" else 1), flywheel.text
    lost = "aurora-rl: the learner's last training state was not written: "
    assert flywheel.text.splitlines()[-1].startswith(lost) == (end == "killed")
    assert bool(flywheel.events("checkpoint")) == (flywheel.run / "learner").is_dir() == (end == "saved")


def test_a_learner_that_cannot_save_is_told_by_the_flywheel(start: Start) -> None:
    flywheel = start("flywheel", ENDLESS)
    (ready,) = flywheel.wait_for("learner_ready")
    resource.prlimit(ready["pid"], resource.RLIMIT_FSIZE, (10_000, 10_000))
    flywheel.wait_for("request", 30)
    flywheel.interrupt()
    assert flywheel.ended() == 1, flywheel.text
    last = flywheel.text.splitlines()[-1]
    assert last.startswith("aurora-rl: the learner ended with status 1: ")
    assert "could not be written" in last and last.endswith(f"see {flywheel.run / 'learner.log'}")
    assert "the training state could not be written" in (flywheel.run / "learner.log").read_text()
    assert not list(flywheel.run.glob(".*"))
    assert {path.name for path in flywheel.run.iterdir()} >= FILES | {"answers.jsonl", "drafter"}
    assert "Traceback" not in flywheel.text
