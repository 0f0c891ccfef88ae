"""The stream on disk: recorded once, in the order of asking, and read with the features that a drafter wants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aurora_rl.adaptation.recorded_stream import Parts, RecordedPhase, record_plain_decoding
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import Request, SamplingParams
from aurora_rl.testing import tiny_target
from aurora_rl.trajectories import validate

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


def test_parts_are_the_requests_cut_and_every_token_is_new_in_one_of_them(recorded: Path) -> None:
    phase = RecordedPhase(recorded, LAYERS, LAYERS)
    parts = Parts(phase, 4)
    sizes = [4, 4, 4, 3, 4, 3, 2, 4, 4, 1]  # of 12, 3, 7, 2 and 9 tokens
    assert parts.positions == [0, 1, 2, 0, 0, 1, 0, 0, 1, 2] and len(parts) == len(sizes)
    request, at = -1, 0
    for index, size in enumerate(sizes):
        if parts.positions[index] == 0:
            request, at = request + 1, 3
        whole, part = phase[request], parts[index]
        width = whole["sequence", "features"].shape[-1]
        validate(part, vocab_size=tiny_target().config.vocab_size, feature_size=width, hidden_size=width // 2)
        sequence = part["sequence"]
        assert int(part["request"]) == request and int(sequence["prompt_length"]) == at
        assert torch.equal(sequence["tokens"], whole["sequence", "tokens"][: at + size])
        assert torch.equal(sequence["features"], whole["sequence", "features"][: at + size - 1])
        assert torch.equal(sequence["hidden"], whole["sequence", "hidden"][at - 3 : at - 3 + size])
        assert part["rounds", "anchor"].tolist() == list(range(at - 1, at + size - 1))
        at += size
        ended = parts.ended(index)
        if at == 3 + BUDGETS[request]:
            assert ended is not None and torch.equal(ended["sequence", "tokens"], whole["sequence", "tokens"])
        else:
            assert ended is None
