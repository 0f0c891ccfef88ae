"""`aurora-rl fleet` on a Ray cluster of this machine: engines and learner die, are started again, and end in order."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from http_clients import ask
from loopback_ports import free_ports
from processes import alive, wait
from ray import cluster_utils
from run_events import events

from aurora_rl.training.states import check_state, states

pytestmark = pytest.mark.faults
Start = Callable[..., Any]
NODE = {"include_dashboard": False, "object_store_memory": 80 << 20}


def processes(*words: str) -> list[int]:
    """Processes that have all of these in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:  # ended since
            continue
        if all(word in line for word in words):
            found.append(int(path.parent.name))
    return [pid for pid in found if alive(pid)]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children(pid: int) -> list[int]:
    """All processes that a process has started, and those that they have."""
    mine = [int(path.name) for path in Path("/proc").glob("[0-9]*") if alive(int(path.name))]
    direct = []
    for each in mine:
        try:
            if parent(each) == pid:
                direct.append(each)
        except OSError:
            continue
    return direct + [each for child in direct for each in children(child)]


def test_engines_and_learner_that_die_are_started_again(start: Start, tmp_path: Path) -> None:
    port, _ = free_ports(2)
    file = tmp_path / "fleet.yaml"
    group = {"replicas": 2, "num_cpus": 0.5, "overrides": [f"http.port={port}"]}
    file.write_text(yaml.safe_dump({"fleet": {"engines": {"chat": group}, "learner": {"num_cpus": 0.5}}}))
    fleet = start(f"fleet --config {file}")
    members = fleet.run / "members"
    clients = [openai.OpenAI(base_url=f"http://127.0.0.1:{port + n}/v1", api_key="none", max_retries=0) for n in (0, 1)]

    def swaps(engine: int) -> list[int]:
        return [event["version"] for event in events(members / f"chat-{engine}", "swap")]

    def served(*engines: int) -> None:
        """Ask the engines until each has got weights that it had not before."""
        before = [len(swaps(engine)) for engine in engines]

        def newer() -> bool:
            assert fleet.process.poll() is None, fleet.text
            for engine in engines:
                with contextlib.suppress(openai.APIConnectionError):  # it does not listen yet
                    ask(clients[engine], "Number 1?", max_tokens=8)
            return all(len(swaps(engine)) > count for engine, count in zip(engines, before, strict=True))

        wait(newer, 120)

    served(0, 1)
    wait(lambda: events(members / "learner", "checkpoint"))
    (engine,), (learner,) = (processes("aurora_rl", f"{members}/{name}.yaml") for name in ("chat-0", "learner"))
    os.kill(parent(engine), signal.SIGKILL)  # the actor, as when Ray or its node fails
    os.kill(learner, signal.SIGKILL)
    wait(lambda: not alive(engine))
    served(0, 1)
    restarts = {event["member"]: event["restarts"] for event in fleet.events("member_started")}
    assert restarts["chat-0"] >= 1 and restarts["learner"] == 1 and restarts["chat-1"] == 0, fleet.text
    assert events(members / "learner", "resumed")[0]["steps"] > 0
    assert {event["member"] for event in fleet.events("member_ended")} == {"chat-0", "learner"}
    (targets,) = json.loads((fleet.run / "prometheus.json").read_text())[1]["targets"]
    assert targets == f"127.0.0.1:{port + 1}"

    started = children(fleet.process.pid)
    assert len(started) > 5  # Ray's, its actors and their members
    fleet.interrupt()
    assert fleet.ended() == 0, fleet.text
    assert "chat-0 answers at" in fleet.text and "2/2 engines work" in fleet.text, fleet.text
    assert [pid for pid in started if alive(pid)] == []
    check_state(states(members / "learner" / "learner")[0])
    assert all((members / f"chat-{number}" / "summary.json").is_file() for number in (0, 1))


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster to which nodes can be added, each with an address of its own on this machine."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **NODE})
    yield cluster
    cluster.shutdown()


@pytest.mark.stress
def test_a_learner_whose_node_dies_goes_on_at_another_address(start: Start, tmp_path: Path, nodes: Any) -> None:
    first = nodes.add_node(num_cpus=0, resources={"learner": 1}, node_ip_address="127.0.0.2", **NODE)
    file = tmp_path / "fleet.yaml"
    engines = {"chat": {"num_cpus": 1, "overrides": [f"http.port={(port := free_ports()[0])}"]}}
    learner = {"num_cpus": 0, "resources": {"learner": 1}}
    section = {"address": nodes.address, "engines": engines, "learner": learner}
    file.write_text(yaml.safe_dump({"fleet": section}))
    fleet = start(f"fleet --config {file}")
    members = fleet.run / "members"
    api = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def served(count: int) -> None:
        """Ask until the engine has got weights so often."""

        def newer() -> bool:
            assert fleet.process.poll() is None, fleet.text
            with contextlib.suppress(openai.APIConnectionError):  # it does not listen yet
                ask(api, "Number 1?", max_tokens=8)
            return len(events(members / "chat-0", "swap")) >= count

        wait(newer, 120)

    served(1)
    wait(lambda: events(members / "learner", "checkpoint"))
    assert "tcp://127.0.0.2:" in (members / "chat-0.yaml").read_text()
    os.kill(first.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    nodes.add_node(num_cpus=0, resources={"learner": 1}, node_ip_address="127.0.0.3", **NODE)
    wait(lambda: len(events(members / "learner", "resumed")), 120)
    served(len(events(members / "chat-0", "swap")) + 1)
    assert "the learner is on node 127.0.0.3 now; engines are started again with its addresses" in fleet.text
    assert "tcp://127.0.0.3:" in (members / "chat-0.yaml").read_text()
    restarts = {event["member"]: event["restarts"] for event in fleet.events("member_started")}
    assert restarts == {"learner": 1, "chat-0": 0}  # the engine was recalled and did not die
    fleet.interrupt()
    assert fleet.ended(120) == 0, fleet.text
    assert processes("aurora_rl", str(members)) == []
