"""What a learner tells of its engines, over the real wire."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from learner_loops import HANDSHAKE, Make, drain, send, step_until
from tensordict import TensorDict

from aurora_rl.collectors.sink import TrajectorySink


def test_arrivals_staleness_and_drops_are_told_by_engine(
    make: Make, served: list[TensorDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aurora_rl.training.wire_notes._ENGINES_S", 0.0)
    monkeypatch.setattr("aurora_rl.training.wire_notes._NOTE_S", 0.0)
    loop = make(buffer=4, batch_size=2)
    loop.learner.version = 5
    sender = loop.sink._meta["engine"]
    lagging = [each.copy() for each in served[:12]]
    for trajectory in lagging:
        trajectory["rounds", "policy_version"] = torch.full_like(trajectory["rounds", "policy_version"], 3)
    send(loop, lagging)
    stranger = TrajectorySink(
        loop.collector.address, handshake=replace(HANDSHAKE, draft_map_checksum="other"), name="stranger"
    )
    try:
        stranger.extend(served[0])
        step_until(loop, lambda: any("stranger" in event["engines"] for event in loop.events("engines")))
    finally:
        stranger.close()
    drain(loop)
    loop.learner.close()
    last = loop.events("engines")[-1]
    assert last["engines"]["stranger"] == {
        "trajectories": 0, "version": None, "staleness": None, "drops": {"handshake": 1},
    }  # fmt: skip
    figures = last["engines"][sender]
    assert (figures["trajectories"], figures["version"], figures["staleness"]) == (12, 3, 2)
    assert figures["drops"] == {"buffer_full": 12 - loop.learner.seen}


def test_nothing_new_is_not_told_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aurora_rl.training.wire_notes._ENGINES_S", 0.0)
    monkeypatch.setattr("aurora_rl.training.wire_notes._NOTE_S", 0.0)
    loop = make()
    for _ in range(3):
        loop.learner.step(wait_s=0.0)
    assert not loop.events("engines") and not loop.events("drops")
