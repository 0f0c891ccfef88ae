"""Mutated and generated messages: a clean error each, no crash, no hang, and no allocation beyond what was sent.

AURORA_RL_FRAMES sets how many; `make stress` asks for a million.
"""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aurora_rl.collectors import codec
from aurora_rl.collectors.codec import CodecError, Limits, decode, encode
from aurora_rl.collectors.engine_book import EngineBook
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.relay import Meter, TooLongError
from aurora_rl.sampling_params import SamplingParams
from aurora_rl.trajectories import make_trajectory, validate

FRAMES = int(os.environ.get("AURORA_RL_FRAMES", "20000"))
LIMITS = Limits(max_bytes=1 << 16, max_leaves=64, max_header_bytes=1 << 14)
HANDSHAKE = Handshake(1, "config", "head", (2, 5), "", "eagle3")
SERVING = {"engine": "x", "version": 0, "checksum": "0" * 32, "received": 1, "handshake": HANDSHAKE.to_meta()}


def trajectory() -> Any:
    node = {"tokens": torch.tensor([3, 4]), "parents": torch.tensor([-1, 0]), "accepted": torch.tensor([True, False])}
    tree = {**node, "log_probs": torch.zeros(2), "hidden": torch.zeros(2, 4)}
    return make_trajectory(
        request=1, tokens=torch.tensor([5, 6, 7, 8]), prompt_length=2, features=torch.ones(3, 8),
        target={"hidden": torch.ones(2, 4)}, anchors=[1], trees=[tree], policy_versions=[0], cache_versions=[0],
        sampling_params=SamplingParams(),
    )  # fmt: skip


SEEDS = [
    encode("trajectory", {"handshake": HANDSHAKE.to_meta(), "engine": "x"}, trajectory()),
    encode("weights", {"version": 3, "checksum": "0" * 32}, {("a", "b"): torch.ones(2, 3), "c": torch.ones(0, 4)}),
    encode("serving", SERVING),
    encode("ack", {"engine": "x", "version": 1, "checksum": "", "swap_ms": 1.0}),
    encode("nack", {"engine": "x", "version": None, "reason": "no"}),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308),
    *("", "x", "int64", "bool", "float8_e4m3fn", "complex64", "\ud800", "\x00", "x" * 300),
    *([], {}, [[]], [1, [2]], {"a": {"b": 1}}, [2**62, 0, 2**62]),
]  # fmt: skip


def somewhere(node: Any, choose: random.Random) -> tuple[Any, Any] | None:
    """A container in a JSON value, and one of its keys; None if there is none."""
    found = None
    while node and isinstance(node, dict | list):
        found = node, choose.choice(list(node)) if isinstance(node, dict) else choose.randrange(len(node))
        if choose.random() < 0.2:
            break
        node = node[found[1]]
    return found


def mutated_header(header: bytes, choose: random.Random) -> bytes:
    tree = json.loads(header)
    for _ in range(choose.randint(1, 3)):
        if (found := somewhere(tree, choose)) is None:
            break
        container, key = found
        match choose.randrange(4):
            case 0:
                del container[key]
            case 1 if isinstance(container, list):
                container.insert(key, copy.deepcopy(choose.choice(container)))
            case 2:
                container[choose.choice(["kind", "meta", "x"]) if isinstance(container, dict) else key] = nest(choose)
            case _:
                container[key] = copy.deepcopy(choose.choice(VALUES))
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def nest(choose: random.Random) -> Any:
    value: Any = choose.choice(VALUES)
    for _ in range(choose.choice([1, 9, 200])):
        value = [value] if choose.random() < 0.5 else {"x": value}
    return value


def mutated(choose: random.Random) -> list[bytes]:
    """A message that was one, or never was."""
    frames = [bytes(frame) for frame in choose.choice(SEEDS)]
    for _ in range(choose.randint(1, 3)):
        at = choose.randrange(len(frames)) if frames else 0
        match choose.randrange(8):
            case 0 | 1 | 2 if frames:
                try:
                    frames[0] = mutated_header(frames[0], choose)
                except (ValueError, RecursionError):  # it is no JSON any more
                    frames[0] = choose.randbytes(choose.randrange(64))
            case 3 if frames:
                content = bytearray(frames[at] or b"\0")
                content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
                frames[at] = bytes(content)
            case 4 if frames:
                frames[at] = frames[at][: choose.randrange(len(frames[at]) + 1)]
            case 5 if frames:
                frames[at] += choose.randbytes(choose.choice([1, 8, 1 << 12]))
            case 6:
                frames.insert(at, choose.choice([b"", b"{}", choose.randbytes(16), *frames]))
            case _ if frames:
                del frames[at]
    return frames


def test_no_message_does_more_than_raise_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated, empty = Counter[str](), torch.empty

    def counting(shape: Any, *, dtype: torch.dtype) -> torch.Tensor:
        tensor = empty(shape, dtype=dtype)
        allocated["bytes"] += tensor.nbytes
        return tensor

    monkeypatch.setattr(codec.torch, "empty", counting)
    choose, came, book, slowest = random.Random(0), Counter[str](), EngineBook(), 0.0
    consumers: list[Callable[[codec.Message], object]] = [
        lambda message: Handshake.from_meta(message.meta.get("handshake")),
        lambda message: book.note_serving(b"a", "x", message.meta),
        lambda message: book.note_ack(b"a", message.meta),
        lambda message: book.note_nack(b"a", message.meta),
    ]
    for _ in range(FRAMES):
        frames = mutated(choose)
        allocated.clear()
        began = time.perf_counter()
        try:
            message = decode(frames, limits=LIMITS)
        except CodecError as error:
            assert len(str(error)) < 1000 and not allocated
            came["refused"] += 1
            continue
        finally:
            slowest = max(slowest, time.perf_counter() - began)
        came["read"] += 1
        assert allocated["bytes"] <= sum(map(len, frames)) <= LIMITS.max_bytes
        encode(message.kind, message.meta, message.tensors)
        for consume in consumers:
            try:
                consume(message)
            except CodecError as error:
                assert len(str(error)) < 1000
        try:
            validate(message.tensors, vocab_size=32, feature_size=8, hidden_size=4)
            came["valid"] += 1
        except (ValueError, TypeError, LookupError, RuntimeError):  # what the collector drops a message for
            pass
    assert slowest < 1.0 and len(book.engines) <= 1 and book.next_version <= 2**32 + 1
    assert came["refused"] > FRAMES // 2 and came["read"] > FRAMES // 50 and came["valid"] > FRAMES // 1000


@pytest.mark.parametrize("sealed", [False, True])
def test_no_stream_makes_the_meter_do_more_than_raise_its_error(sealed: bool) -> None:
    choose, refused = random.Random(1), 0
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    for _ in range(FRAMES // 4):
        parts = [
            bytes([choose.choice([0, 1, 4])]) + bytes([size := choose.randrange(40)]) + choose.randbytes(size)
            for _ in range(choose.randrange(6))
        ]
        stream = bytearray(greeting + b"".join(parts))
        for _ in range(choose.randrange(3)):
            stream[choose.randrange(len(stream))] = choose.randrange(256)
        meter, at = Meter(Limits(max_bytes=100, max_leaves=2), sealed=sealed), 0
        try:
            while at < len(stream):
                step = choose.randint(1, 50)
                assert meter.feed(memoryview(stream)[at : at + step]) >= 0 and meter.held <= 100
                at += step
        except TooLongError:
            refused += 1
    assert 0 < refused < FRAMES // 4
