"""Questions to SGLang's plugin: answers, refusals, faults, and messages that are none."""

import threading
from functools import partial

import pytest
import zmq

from aurora_rl.collectors.codec import encode
from aurora_rl.envs.remote.plugin_server import PluginError, PluginServer
from aurora_rl.envs.remote.plugin_server import ask as ask_engine

ask = partial(ask_engine, engine="SGLang")


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(PluginServer("tcp://127.0.0.1:*", answer))
        return servers[-1].address

    yield start
    for server in servers:
        server.close()


def test_an_answer_comes_back_with_what_was_asked(serve):
    address = serve(lambda kind, fields: {"kind": kind, **fields})
    assert ask(address, "record", {"on": True}) == {"kind": "record", "on": True}


def test_a_refusal_says_why(serve):
    def refuse(kind, fields):
        raise PluginError("detach first")

    with pytest.raises(PluginError, match="^detach first$"):
        ask(serve(refuse), "attach")


def test_a_fault_is_told_and_the_next_question_answered(serve):
    def answer(kind, fields):
        return {"ratio": 1 / fields["divisor"]}

    address = serve(answer)
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        ask(address, "status", {"divisor": 0})
    assert ask(address, "status", {"divisor": 2}) == {"ratio": 0.5}


@pytest.mark.parametrize("frames", [[b"no json"], [b"\x80\x04pickle"], [], [b"{}", b"tensor"]])
def test_what_is_malformed_is_refused_and_harms_nobody(serve, frames):
    address = serve(lambda kind, fields: {})
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(address)
        socket.send_multipart(frames or [b""])
        assert socket.poll(5000) and b"refused" in socket.recv_multipart()[0]
    assert ask(address, "status") == {}


def test_a_message_above_the_limit_is_not_even_received(serve):
    address = serve(lambda kind, fields: {})
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(address)
        socket.send_multipart([*encode("status"), b"x" * (1 << 20)])
        assert not socket.poll(300)
    assert ask(address, "status") == {}


def test_silence_names_the_address_and_the_variable():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind("tcp://127.0.0.1:*")
        address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        with pytest.raises(PluginError, match=f"no answer at {address} within 0 s.*AURORA_RL_SGLANG={address}"):
            ask(address, "status", timeout=0.1)


def test_many_may_ask_at_once(serve):
    address = serve(lambda kind, fields: fields)
    answers = {}

    def put(n):
        answers[n] = ask(address, "status", {"n": n})["n"]

    threads = [threading.Thread(target=put, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: n for n in range(8)}
