"""Recordings: what is written comes back bit for bit, in order, and half a file is no trajectory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensordict import TensorDict

from aurora_rl.collectors import dataset
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.policies import Eagle3Drafter, TargetParts
from aurora_rl.testing import tiny_target, tiny_trajectory


def trajectories(count: int) -> list[TensorDict]:
    drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)).double()
    trajectories = [tiny_trajectory(drafter, request=i, prompt_length=2 + i) for i in range(count)]
    trajectories[0]["sequence", "features"] = trajectories[0]["sequence", "features"].bfloat16()  # dtypes are kept
    return trajectories


def same(first: TensorDict, second: TensorDict) -> bool:
    keys = set(first.keys(True, True))
    return keys == set(second.keys(True, True)) and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in keys
    )


def test_a_stream_comes_back(tmp_path: Path) -> None:
    written, recording = trajectories(3), TrajectoryDataset(tmp_path / "new" / "folder")
    assert len(recording) == 0 and list(recording) == []
    for trajectory in written[:2]:
        recording.append(trajectory)
    again = TrajectoryDataset(tmp_path / "new" / "folder")  # as a restarted learner opens it
    again.append(written[2])
    assert len(again) == 3
    assert again.numbers("request") == [0, 1, 2]
    assert all(same(a, b) for a, b in zip(written, again, strict=True))


def test_what_is_not_there_or_broken_is_named(tmp_path: Path) -> None:
    recording = TrajectoryDataset(tmp_path)
    recording.append(trajectories(1)[0])
    with pytest.raises(IndexError, match="holds 1 trajectories, asked for number 1"):
        recording[1]
    path = tmp_path / "000000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="000000.safetensors is no trajectory"):
        recording[0]
    with pytest.raises(ValueError, match="000000.safetensors is no trajectory"):
        recording.numbers("request")
    (tmp_path / "000001.part").write_bytes(b"")  # of a process that was killed
    assert len(TrajectoryDataset(tmp_path)) == 1


def test_a_recording_says_which_layers_its_features_are_of(tmp_path: Path) -> None:
    written = trajectories(1)[0]
    TrajectoryDataset(tmp_path, (0, 1)).append(written)
    assert same(TrajectoryDataset(str(tmp_path))[0], written)
    assert len(TrajectoryDataset(tmp_path, (0, 1))) == 1
    with pytest.raises(ValueError, match="recorded for a drafter that reads layers 0,1, this one reads 1,2; take the"):
        TrajectoryDataset(tmp_path, (1, 2))  # as wide, and something else


def test_a_recording_of_an_earlier_layout_is_named(tmp_path: Path) -> None:
    save_file({"spine.tokens": torch.arange(3)}, tmp_path / "000000.safetensors")
    for read in (lambda recording: recording[0], lambda recording: recording.numbers("request")):
        with pytest.raises(ValueError, match="the layout of an earlier release .* record the requests again"):
            read(TrajectoryDataset(tmp_path))


def test_a_recording_of_another_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = trajectories(1)[0]
    monkeypatch.setattr(dataset, "SCHEMA", 3)
    TrajectoryDataset(tmp_path).append(written)
    assert same(TrajectoryDataset(tmp_path)[0], written)
    monkeypatch.undo()
    message = "000000.safetensors has the layout schema 3, this release reads 2; record the requests again"
    with pytest.raises(ValueError, match=message):
        TrajectoryDataset(tmp_path)[0]
