"""Steps of a learner next to an engine, until what a test waits for has happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from processes import wait
from tensordict import TensorDict

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.testing import tiny_target

HANDSHAKE = Handshake(1, "tiny", "", (0, 1), "", "eagle3")
SHAPE = TreeShape(3)
# Of a few random targets, one whose texts follow rules that can be learned from few of them.
TARGET = tiny_target(dtype=torch.float32, seed=1)
PARTS = TargetParts.of(TARGET)


def day0(vocab: Sequence[int] = range(32)) -> Eagle3Drafter:
    torch.manual_seed(0)
    return Eagle3Drafter.from_target(PARTS, draft_vocab=torch.tensor(vocab))


Make = Callable[..., SimpleNamespace]


def send(loop: SimpleNamespace, trajectories: list[TensorDict]) -> None:
    for trajectory in trajectories:
        loop.sink.extend(trajectory)
    wait(lambda: loop.sink.sent and not loop.sink.queued)
    time.sleep(0.05)


def step_until(loop: SimpleNamespace, condition: Callable[[], object]) -> None:
    def stepped() -> object:
        loop.learner.step(wait_s=0.01)
        return condition()

    wait(stepped)


def drain(loop: SimpleNamespace) -> None:
    while loop.learner.step(wait_s=0.1):
        pass


def publish_first(loop: SimpleNamespace, trajectories: list[TensorDict]) -> None:
    """Publish version 1 after two trajectories, by a gate of the next two, and have no candidate after that."""
    send(loop, trajectories[:2])
    step_until(loop, lambda: loop.events("candidate"))
    send(loop, trajectories[2:4])
    step_until(loop, lambda: loop.learner.version == 1)
    loop.learner._publish_every = 10_000
    drain(loop)
