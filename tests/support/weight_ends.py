"""Both ends of the wire of weights, and a learner whose every message a test writes."""

from __future__ import annotations

import time

import torch
import zmq
from processes import wait
from tensordict import TensorDict

from aurora_rl.collectors.codec import checksum, decode, encode
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.sockets import bind, open_socket
from aurora_rl.collectors.weights import WeightReceiver

HANDSHAKE = Handshake(1, "config", "head", (2, 5), "", "eagle3")
LOCAL = "tcp://127.0.0.1:*"


def weights(value: float) -> TensorDict:
    return TensorDict({"layer": {"w": torch.full((2, 3), value)}}, batch_size=[])


def engine(address: str, **options: object) -> WeightReceiver:
    return WeightReceiver(address, **{"handshake": HANDSHAKE, "name": "engine", **options})


def take(receiver: WeightReceiver) -> tuple[int, TensorDict]:
    got: list[tuple[int, TensorDict]] = []

    def arrived() -> bool:
        latest = receiver.latest()
        got.extend([latest] if latest else [])
        return bool(got)

    wait(arrived)
    return got[0]


def load(receiver: WeightReceiver) -> int:
    version, tensors = take(receiver)
    receiver.acknowledge(version, checksum(tensors), swap_ms=1.5)
    return version


def free_address() -> str:
    socket = open_socket(zmq.ROUTER)
    address = bind(socket, LOCAL)
    socket.close()
    return address


class FakeLearner:
    """A bare ROUTER, to send what a `WeightPublisher` would not."""

    def __init__(self) -> None:
        self.socket = open_socket(zmq.ROUTER)
        self.address = bind(self.socket, LOCAL)

    def receive(self, kind: str) -> tuple[bytes, dict]:
        deadline = time.monotonic() + 5  # other messages, heartbeats among them, do not prolong it
        while time.monotonic() < deadline:
            if self.socket.poll(100):
                identity, *frames = self.socket.recv_multipart()
                message = decode(frames)
                if message.kind == kind:
                    return identity, message.meta
        raise AssertionError("timed out")

    def send(self, identity: bytes, version: int) -> None:
        tensors = weights(float(version))
        meta = {"version": version, "checksum": checksum(tensors), "identity": HANDSHAKE.identity}
        self.socket.send_multipart([identity, *encode("weights", meta, tensors)])

    def await_received(self, version: int) -> None:
        """Until the engine says that these weights have arrived."""
        wait(lambda: self.receive("serving")[1]["received"] == version)

    def close(self) -> None:
        self.socket.close()
