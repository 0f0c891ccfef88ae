"""The stream on disk: recorded once, in the order of asking, and read with the features that a drafter wants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aurora_rl.adaptation.recorded_stream import RecordedPhase, record_plain_decoding
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import Request, SamplingParams
from aurora_rl.testing import tiny_target

LAYERS = (0, 1)
BUDGETS = (12, 3, 7, 2, 9)  # so that requests end in another order than they came


def requests() -> list[Request]:
    return [
        Request(i, torch.tensor([3 + i, 4, 5 + i]), SamplingParams(max_tokens=most)) for i, most in enumerate(BUDGETS)
    ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phase")
    recording = TrajectoryDataset(folder, LAYERS)
    record_plain_decoding(tiny_target(), requests()[:3], recording, LAYERS, num_slots=2)
    assert len(recording) == 3
    record_plain_decoding(tiny_target(), requests(), recording, LAYERS, num_slots=2)  # goes on
    assert len(recording) == 5
    return folder


def test_requests_come_in_the_order_of_asking(recorded: Path) -> None:
    phase = RecordedPhase(recorded, LAYERS, LAYERS)
    assert [int(phase[index]["request"]) for index in range(len(phase))] == [0, 1, 2, 3, 4]
    ends = [int(t["request"]) for t in TrajectoryDataset(recorded)]
    assert ends != sorted(ends)


def test_nothing_is_drafted_and_every_round_says_one_token(recorded: Path) -> None:
    phase = RecordedPhase(recorded, LAYERS, LAYERS)
    for index in range(len(phase)):
        trajectory = phase[index]
        assert len(trajectory["nodes", "tokens"]) == 0
        completion = len(trajectory["sequence", "tokens"]) - int(trajectory["sequence", "prompt_length"])
        assert completion == BUDGETS[index]


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1), ()])
def test_features_of_some_layers_are_those_of_a_recording_of_these_layers(
    recorded: Path, wanted: tuple[int, ...], tmp_path: Path
) -> None:
    recording = TrajectoryDataset(tmp_path, wanted)
    record_plain_decoding(tiny_target(), requests(), recording, wanted, num_slots=2)
    alone, some = RecordedPhase(tmp_path, wanted, wanted), RecordedPhase(recorded, LAYERS, wanted)
    for index in range(len(alone)):
        a, b = alone[index], some[index]
        assert torch.equal(a["sequence", "tokens"], b["sequence", "tokens"])
        torch.testing.assert_close(a["sequence", "features"], b["sequence", "features"], rtol=0, atol=1e-10)
