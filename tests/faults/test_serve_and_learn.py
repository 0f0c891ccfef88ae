"""`serve` and `learn` on two terminals: either goes on without the other, and they find each other again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from processes import wait

pytestmark = pytest.mark.faults

Start = Callable[..., Any]
ENDLESS = "traffic.requests=5000"

SERVE = ("flywheel", "learner.spawn=false")


def test_either_side_restarts(start: Start) -> None:
    learner, server = start("learn"), start(*SERVE, ENDLESS, "drafter.adaptive=true")
    server.wait_for("swap", 2)
    learner.process.kill()
    learner.ended()
    assert learner.run.joinpath("learner.yaml").exists()

    # Serving goes on, and a new learner, which knows nothing of the old one, gets trajectories and is heard.
    served, swaps = len(server.events("request")), server.events("swap")
    second = start("learn")
    server.wait_for("request", served + 20)

    def heard() -> bool:
        # Its first numbers may be too low, until it hears what the server serves or publishes more.
        numbers = {event["version"] for event in second.events("gate") if event["publish"]}
        numbers |= {event["version"] for event in second.events("renumbered")}
        return any(event["version"] in numbers for event in server.events("swap")[len(swaps) :])

    wait(heard)
    versions = [event["version"] for event in server.events("swap")]
    assert versions == sorted(set(versions)) and versions[-1] > swaps[-1]["version"]
    server.interrupt()
    assert server.ended() == 130, server.text
    assert server.summary["versions_served"] == [0, *versions]
    assert server.summary["failed"] == 0

    # A new server gets the newest weights before it has served anything to speak of.
    newest = second.events("gate")[-1]["version"]
    another = start(*SERVE, "traffic.requests=12")
    assert another.ended() == 0, another.text
    first = another.events("swap")[0]
    assert first["version"] >= newest
    assert first["requests"] <= 2
    second.interrupt()
    assert second.ended() == 0, second.text
    (over,) = second.events("learner_done")
    assert over["seen"] > 0


def test_both_sides_show_the_one_mismatch(start: Start) -> None:
    learner, server = (
        start("learn"),
        start(*SERVE, "drafter.vocab_size=32", "traffic.requests=1000"),
    )
    reason = server.wait_for("refused")[0]["reason"]
    # The server, which may be a stranger, is not told the learner's value.
    assert reason.startswith("handshake mismatch: draft_map_checksum differs from the learner's, whose log has both")
    told = learner.wait_for("refused")[0]["reason"]
    assert told.startswith("handshake mismatch: draft_map_checksum is ")
    count = len(server.events("request"))
    server.wait_for("request", count + 2)  # serving goes on
    server.interrupt()
    assert server.ended() == 130
    time.sleep(0.3)
    learner.interrupt()
    assert learner.ended() == 0
    for side, said in ((learner, told), (server, reason)):
        assert said in " ".join(side.text.split())
        assert len(side.events("refused")) == 1
    assert server.events("swap") == []
    assert learner.events("train") == []
    assert learner.events("learner_done")[0]["seen"] == 0


def test_a_learner_goes_on_in_its_folder(start: Start) -> None:
    learner, server = start("learn"), start(*SERVE, ENDLESS)
    server.wait_for("swap")
    learner.interrupt()
    assert learner.ended() == 0, learner.text
    (over,) = learner.events("learner_done")
    command = [sys.executable, "-m", "aurora_rl.cli.main", "learn", "--resume", str(learner.run)]
    with learner.output.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=output) as again:
        try:
            deadline = time.monotonic() + 60
            while not any(event["steps"] > over["steps"] for event in learner.events("train")):
                assert again.poll() is None and time.monotonic() < deadline, learner.text
                time.sleep(0.02)
            again.send_signal(signal.SIGINT)
            assert again.wait(60) == 0, learner.text
        finally:
            again.kill()
    first, last = learner.events("learner_done")
    assert first == over and last["version"] > over["version"] and last["seen"] > over["seen"]
    steps = [event["steps"] for event in learner.events("train")]
    assert steps == sorted(set(steps))
    assert [path.name for path in (learner.run / "part-1").iterdir()] == ["learner.yaml"]
    server.interrupt()
    assert server.ended() == 130, server.text
    assert server.summary["failed"] == 0
