"""What SGLang is told of a drafter's folder. The rest of the engine is shown on real SGLang."""

import pytest
import torch

from aurora_rl.envs.sglang.client import drafter_arguments
from aurora_rl.policies import Eagle3Drafter, EagleDrafter, MedusaDrafter, TargetParts, save_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_target

PART, WHOLE = torch.tensor([2, 7, 11, 30]), torch.arange(32)


@pytest.mark.parametrize(
    ("kind", "vocab", "algorithm", "mapped"),
    [
        (Eagle3Drafter, PART, "EAGLE3", False),
        (EagleDrafter, PART, "EAGLE", True),
        (EagleDrafter, WHOLE, "EAGLE", False),
    ],
)
def test_the_algorithm_and_the_draft_vocabulary_are_those_of_the_folder(tmp_path, kind, vocab, algorithm, mapped):
    layers = {"feature_layers": (1, 2)} if kind is Eagle3Drafter else {}
    made = kind.from_target(TargetParts.of(tiny_target(dtype=torch.float32)), draft_vocab=vocab, **layers)
    save_drafter(made, tmp_path / "drafter", "sglang")
    token_map = tmp_path / "token_map.pt"
    arguments = drafter_arguments(tmp_path / "drafter", token_map)
    expected = ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(tmp_path / "drafter")]
    assert arguments == expected + (["--speculative-token-map", str(token_map)] if mapped else [])
    assert token_map.exists() == mapped
    if mapped:
        # As SGLang reads it.
        assert torch.tensor(torch.load(token_map, weights_only=True), dtype=torch.int64).tolist() == vocab.tolist()


def test_a_folder_that_sglang_does_not_serve_is_named(tmp_path):
    made = MedusaDrafter.from_target(TargetParts.of(tiny_target(dtype=torch.float32)), draft_vocab=WHOLE)
    save_drafter(made, tmp_path / "drafter")
    with pytest.raises(CheckpointError, match="drafter: config.json is of MedusaDrafter, which SGLang does not serve"):
        drafter_arguments(tmp_path / "drafter", tmp_path / "token_map.pt")


def test_a_folder_without_a_drafter_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a checkpoint"):
        drafter_arguments(tmp_path / "nowhere", tmp_path / "token_map.pt")
