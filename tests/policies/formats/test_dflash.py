"""DFlash folders: what engines read, entries that older files leave out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from drafters import DFLASH_SHAPES, HALF_THE_VOCAB, dflash_of_the_target
from safetensors.torch import load_file, save_file
from torch import Tensor

from aurora_rl.policies import DFlashDrafter, TargetParts
from aurora_rl.policies.formats.files import load_drafter, save_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.trajectories import pack


@pytest.mark.parametrize("format", ["hf", "sglang"])
@pytest.mark.parametrize("vocab", [HALF_THE_VOCAB, torch.arange(32)])
def test_a_folder_holds_what_engines_read(format: str, vocab: Tensor, parts: TargetParts, tmp_path: Path) -> None:
    drafter = dflash_of_the_target(vocab=vocab, block_size=4, mask_token_id=7).float()
    save_drafter(drafter, tmp_path / "drafter", format)
    tensors = load_file(tmp_path / "drafter" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == DFLASH_SHAPES | (
        {"d2t": (16,)} if len(vocab) < 32 else {}
    )
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    expected = {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "block_size": 4, "num_hidden_layers": 2,
        "num_target_layers": 3, "layer_types": ["full_attention"] * 2, "hidden_size": 16, "head_dim": 4,
        "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "float32",
        "dflash_config": {"mask_token_id": 7, "target_layer_ids": [0, 1]},
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected

    read = load_drafter(tmp_path / "drafter", parts, format=format)
    assert isinstance(read, DFlashDrafter) and read.options == drafter.options
    assert read.feature_layers == drafter.feature_layers and torch.equal(read.head, drafter.head)
    assert all(torch.equal(read.published()[name], tensor) for name, tensor in drafter.published().items())
    batch = pack([tiny_trajectory(drafter)])
    assert torch.equal(read.score(batch), drafter.score(batch))


@pytest.mark.parametrize(("layers", "ids"), [((0, 2), [-1, 1]), ((1, 3), [0, 2])])
def test_sglang_reads_between_layers_only(
    layers: tuple[int, ...], ids: list[int], parts: TargetParts, tmp_path: Path
) -> None:
    drafter = dflash_of_the_target(feature_layers=layers)
    with pytest.raises(CheckpointError, match=r"feature_layers has [03]; engines read .* 1..2 of this target"):
        save_drafter(drafter, tmp_path / "drafter", "sglang")
    save_drafter(drafter, tmp_path / "drafter", "hf")
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert config["dflash_config"]["target_layer_ids"] == ids
    assert load_drafter(tmp_path / "drafter", parts).feature_layers == layers


def edit(folder: Path, drop: str = "", **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | entries
    config["dflash_config"].pop(drop, None)
    (folder / "config.json").write_text(json.dumps(config))


def test_entries_that_a_file_leaves_out_follow_from_the_target_or_the_options(tmp_path: Path) -> None:
    """Older files say less: layers follow from the target's, and the mask has to be given as an option."""
    target = tiny_target(num_layers=8)
    parts = TargetParts.of(target)
    save_drafter(
        DFlashDrafter.from_target(parts, draft_vocab=HALF_THE_VOCAB, feature_layers=(2, 6)), tmp_path / "drafter"
    )
    edit(tmp_path / "drafter", "target_layer_ids", block_size=16)
    assert load_drafter(tmp_path / "drafter", parts).feature_layers == (2, 6)
    edit(tmp_path / "drafter", "mask_token_id")
    with pytest.raises(CheckpointError, match="mask_token_id is missing; set the option"):
        load_drafter(tmp_path / "drafter", parts)
    read = load_drafter(tmp_path / "drafter", parts, options={"mask_token_id": 3})
    assert read.options == {"num_layers": 2, "block_size": 16, "mask_token_id": 3}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"is_causal": True}, "is_causal is True, which DFlashDrafter does not support; it must be False"),
        ({"output_multiplier": 2.0}, "output_multiplier is 2.0"),
        ({"projector_type": "domino"}, "projector_type is 'domino'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"num_target_layers": 30}, "num_target_layers is 30, the target has 3"),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_parameters are"),
        ({"hidden_size": 8}, "hidden_size is 8, the target has 16"),
        ({"num_hidden_layers": 3}, r"config.json: `num_hidden_layers` \(3\) must be equal"),
        ({"num_hidden_layers": 3, "layer_types": None}, "tensor 'layers.2.input_layernorm.weight' .* is missing"),
        ({"dflash_config": {"mask_token_id": 7, "target_layer_ids": [0]}}, "tensor 'fc.weight' has shape"),
        ({"dflash_config": {"mask_token_id": 32, "target_layer_ids": [0, 1]}}, r"must lie in 0..31, got 32"),
    ],
)
def test_files_of_other_drafters_and_targets_are_refused(
    entries: dict[str, Any], message: str, parts: TargetParts, tmp_path: Path
) -> None:
    save_drafter(dflash_of_the_target(), tmp_path / "drafter")
    edit(tmp_path / "drafter", **entries)
    with pytest.raises(CheckpointError, match=message):
        load_drafter(tmp_path / "drafter", parts)


def test_unknown_tensors_are_named(parts: TargetParts, tmp_path: Path) -> None:
    save_drafter(dflash_of_the_target(), tmp_path / "drafter")
    tensors = load_file(tmp_path / "drafter" / "model.safetensors")
    save_file({**tensors, "candidate.weight": torch.ones(4)}, tmp_path / "drafter" / "model.safetensors")
    with pytest.raises(CheckpointError, match="'candidate.weight' is unknown"):
        load_drafter(tmp_path / "drafter", parts)
