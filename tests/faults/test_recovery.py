"""Faults one after the other: requests are answered as before, and the loop learns again by itself.

Those that take long are marked `stress`, and `make stress` runs them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq
from http_clients import Asker, ask, client
from loopback_ports import free_ports
from processes import alive, wait
from safetensors.torch import load_file
from tcp_proxy import TCPProxy

from aurora_rl.cli import main as cli
from aurora_rl.collectors.codec import decode
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.sockets import bind, open_socket
from aurora_rl.collectors.weights import WeightPublisher
from aurora_rl.training.states import newest_valid, states

Start = Callable[..., Any]
SILENT, ANSWERS = (
    "the learner has not answered for 5 s; serving goes on with version",
    "the learner answers again, after",
)


def told(command: Any) -> str:
    """What a command said, on one line."""
    return " ".join(command.text.split())


def learns_again(server: Any, asker: Asker) -> None:
    """Wait until new weights are served, and for answers that they draft."""
    swaps = len(server.events("swap"))
    server.wait_for("swap", swaps + 1)
    asker.more()


def ends(server: Any) -> None:
    """End a server; nothing is left of it, and no request has failed."""
    server.interrupt()
    assert server.ended() == 0, server.text
    assert server.children == [] and server.summary["failed"] == 0


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[tuple[Callable[[float], None], dict[str, str]]]:
    """Sets the wall clock of commands that are started with the environment."""
    file = tmp_path / "clock"
    file.write_text("0")
    here = Path(__file__).parents[1] / "support" / "clock_jumps"
    path = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))

    def jump(seconds: float) -> None:
        (tmp_path / "clock.new").write_text(str(seconds))
        (tmp_path / "clock.new").replace(file)

    yield jump, {"PYTHONPATH": path, "AURORA_TEST_CLOCK": str(file)}


@pytest.mark.faults
def test_a_learner_that_stops_clocks_that_jump_and_a_broken_training_state(start: Start, clock: Any) -> None:
    jump, environment = clock
    server = start("serve", "http.port=0", **environment)
    with Asker(client(server)) as asker:
        learns_again(server, asker)
        (pid,) = server.children

        jump(86_400.0 * 400)
        learns_again(server, asker)
        assert server.events("swap")[-1]["time"] > server.events("begin")[0]["time"] + 86_400.0 * 399
        jump(-86_400.0 * 400)
        learns_again(server, asker)

        os.kill(pid, signal.SIGSTOP)
        wait(lambda: SILENT in told(server))
        asker.more()
        os.kill(pid, signal.SIGCONT)
        wait(lambda: ANSWERS in told(server))
        learns_again(server, asker)
        assert server.children == [pid]

        # The newest state is broken while nothing newer is written: the learner stands still.
        os.kill(pid, signal.SIGSTOP)
        newest, older = states(server.run / "learner")[:2]
        with open(newest / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
        os.kill(pid, signal.SIGKILL)
        (again,) = server.wait_for("learner_restarted")
        assert again["restarts"] == 1 and again["resumed"]
        (resumed,) = server.wait_for("resumed")
        served = server.events("swap")[-1]["version"]
        learns_again(server, asker)
        assert server.events("swap")[-1]["version"] > served and server.children != [pid]
        assert resumed["state"] == str(older) and "model.safetensors is not what was written" in resumed["skipped"][0]
        assert (server.run / "learner.log").read_text().count(f"learning goes on from the older state {older}") == 1
    ends(server)


@pytest.mark.stress
def test_where_every_training_state_is_broken_the_learner_starts_anew_from_what_is_served(start: Start) -> None:
    server = start("serve", "http.port=0")
    with Asker(client(server)) as asker:
        learns_again(server, asker)
        (pid,) = server.children
        os.kill(pid, signal.SIGSTOP)
        for state in states(server.run / "learner"):
            (state / "progress.json").write_text("{}")
        version = server.events("swap")[-1]["version"]
        os.kill(pid, signal.SIGKILL)
        (again,) = server.wait_for("learner_restarted")
        assert not again["resumed"]
        server.wait_for("learner_ready", 2)
        learns_again(server, asker)
        assert server.events("swap")[-1]["version"] > version
        assert told(server).count("as no training state can be used") == 1
        assert newest_valid(server.run / "learner")[0] is not None
        compared = server.events("gate_against")
        assert all(event["same"] for event in compared if event["version"] == version)
    ends(server)


@pytest.mark.stress
@pytest.mark.parametrize("both", [False, True])
def test_a_server_that_is_killed_goes_on_in_its_folder(start: Start, both: bool) -> None:
    (port,) = free_ports()
    server = start("serve", f"http.port={port}")
    api = client(server)
    before = {number: ask(api, f"Number {number}?", max_tokens=8).choices[0].message.content for number in range(5)}
    with Asker(api) as asker:
        learns_again(server, asker)
    version, (learner,) = server.events("swap")[-1]["version"], server.children
    url = str(api.base_url).rstrip("/")
    body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 100, "stream": True}
    with pytest.raises(httpx.TransportError), httpx.stream("POST", f"{url}/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.process.kill()
        if both:
            os.kill(learner, signal.SIGKILL)
        for _ in lines:
            pass
        raise httpx.ReadError("it had been answered whole")
    assert server.ended() == -signal.SIGKILL
    wait(lambda: not alive(learner))

    again = start("serve", f"http.port={port}", resume=server.run)
    with Asker(client(again)) as asker:
        again.wait_for("learner_ready", 2)
        learns_again(again, asker)
    for number, text in before.items():
        assert ask(api, f"Number {number}?", max_tokens=8).choices[0].message.content == text
    assert again.events("swap")[-1]["version"] > version
    (resumed,) = again.events("resumed")
    assert resumed["skipped"] == []
    ends(again)


@pytest.mark.stress
def test_a_network_that_is_cut_and_heals(start: Start, arguments: list[str]) -> None:
    wire = dict(pair.split("=", 1) for pair in arguments if pair.startswith("wire."))
    proxies = {key: TCPProxy(int(address.rpartition(":")[2])) for key, address in wire.items()}
    learner = start("learn")
    away = [f"{key}=tcp://127.0.0.1:{proxy.port}" for key, proxy in proxies.items()]
    server = start("serve", "http.port=0", "learner.spawn=false", *away)
    try:
        with Asker(client(server)) as asker:
            learns_again(server, asker)
            for times in (1, 2):
                for proxy in proxies.values():
                    proxy.cut()
                wait(lambda times=times: told(server).count(SILENT) == times)
                asker.more()
                for proxy in proxies.values():
                    proxy.heal()
                wait(lambda times=times: told(server).count(ANSWERS) == times)
                learns_again(server, asker)
    finally:
        for proxy in proxies.values():
            proxy.close()
    ends(server)
    learner.interrupt()
    assert learner.ended() == 0, learner.text


@pytest.mark.stress
def test_a_folder_that_takes_no_training_state(start: Start) -> None:
    """A file stands where the folder was, which is as if it could only be read, for root too."""
    server = start("serve", "http.port=0")
    with Asker(client(server)) as asker:
        learns_again(server, asker)
        (server.run / "learner").rename(server.run / "moved")
        (server.run / "learner").touch()
        learns_again(server, asker)
        server.wait_for("not_written")
        log = server.run / "learner.log"
        wait(lambda: "the training state was not written, and the run goes on: " in log.read_text())
        assert log.read_text().count("the run goes on") == 1
        (server.run / "learner").unlink()
        saved = len(server.events("checkpoint"))
        learns_again(server, asker)
        server.wait_for("checkpoint", saved + 1)
        assert newest_valid(server.run / "learner")[0] is not None
    ends(server)


class Foreign(Handshake):
    """The handshake of a learner that takes every engine for its own, and publishes another model's weights."""

    identity = "of another model"  # type: ignore[assignment]


@pytest.mark.stress
def test_weights_of_another_model_that_fit(start: Start, arguments: list[str], tmp_path: Path) -> None:
    init = ["drafter", "init", "--out", str(tmp_path / "drafter"), "--to", "aurora_rl", "drafter.name=medusa"]
    assert cli.main([*init, *arguments]) == 0
    tensors = load_file(tmp_path / "drafter" / "model.safetensors")
    address = next(pair.partition("=")[2] for pair in arguments if pair.startswith("wire.weights"))
    server = start("serve", "http.port=0", "learner.spawn=false", f"drafter.path={tmp_path / 'drafter'}")
    with Asker(client(server)) as asker:
        handshake = heard_handshake(address)
        foreign = WeightPublisher(address, handshake=Foreign(**handshake.__dict__))
        foreign.publish(1, {name: t * 2 if t.is_floating_point() else t for name, t in tensors.items()})
        wait(lambda: foreign.rejected_by(1))
        assert next(iter(foreign.rejected_by(1).values())).startswith("weights of another target or drafter")
        foreign.close()
        assert told(server).count("version 1 is refused, 0 stays: weights of another target or drafter") == 1
        asker.more()
        assert server.events("swap") == []
        own = WeightPublisher(address, handshake=handshake)
        own.publish(2, tensors)
        server.wait_for("swap")
        assert own.wait_ack(2, 30)
        own.close()
    ends(server)


def heard_handshake(address: str) -> Handshake:
    """What the engine that connects to an address says of itself."""
    listener = open_socket(zmq.ROUTER)
    bind(listener, address)
    try:
        while True:
            assert listener.poll(30_000)
            message = decode(listener.recv_multipart()[1:])
            if message.kind == "serving":
                return Handshake.from_meta(message.meta["handshake"])
    finally:
        listener.close()
