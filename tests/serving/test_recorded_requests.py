"""Recording requests: those that are not there yet, with the target's own text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import Request, SamplingParams
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.serving.recorded_requests import record_requests
from aurora_rl.testing import serve, tiny_target


def test_recording_serves_what_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, shape = tiny_target(), TreeShape(3, 2, mode="sampled")
    drafter = Eagle3Drafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(16)).double()
    prompts = [torch.arange(2 + i) for i in range(4)]
    requests = [Request(i, prompt, SamplingParams(1.0, seed=i, max_tokens=5)) for i, prompt in enumerate(prompts)]
    record_requests(tiny_target(), drafter, requests[:2], TrajectoryDataset(tmp_path), shape=shape)
    recording = TrajectoryDataset(tmp_path)
    record_requests(tiny_target(), drafter, requests, recording, shape=shape)
    assert sorted(int(t["request"]) for t in recording) == [0, 1, 2, 3]
    expected = serve(
        drafter, target, prompts, shape=TreeShape(0), max_new_tokens=5, sampling_params=SamplingParams(1.0)
    )
    for trajectory in recording:
        text = expected[int(trajectory["request"])]["sequence", "tokens"]
        assert torch.equal(trajectory["sequence", "tokens"], text)  # of the target, whatever was drafted
        assert int(trajectory["sampling", "draft_mode"]) == 1 and len(trajectory["nodes", "tokens"]) > 0
    monkeypatch.setattr(TrajectoryDataset, "__getitem__", lambda *_: pytest.fail("a trajectory was read for its id"))
    before = [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())]
    record_requests(tiny_target(), drafter, requests, recording, shape=shape)
    assert [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())] == before
