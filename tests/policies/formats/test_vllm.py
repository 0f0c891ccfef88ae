"""vLLM's format: what goes there comes back, and what its loaders pass over is refused. `make vllm` runs vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drafters import edit_config, edit_tensors
from torch import Tensor

from aurora_rl.policies import Eagle3Drafter, MedusaDrafter, TargetParts, get_drafter
from aurora_rl.policies.formats.files import load_drafter, save_drafter
from aurora_rl.policies.formats.vllm import from_vllm, to_vllm
from aurora_rl.storage import CheckpointError, read_folder
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.trajectories import pack

Files = tuple[dict[str, Tensor], dict[str, Any]]
IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def deep_parts() -> TargetParts:
    return TargetParts.of(tiny_target(num_layers=8, dtype=torch.float32))


@pytest.fixture
def eagle3(deep_parts, tmp_path) -> Files:
    save_drafter(Eagle3Drafter.from_target(deep_parts, draft_vocab=torch.tensor([2, 7, 30])), tmp_path / "drafter")
    return read_folder(tmp_path / "drafter", "config.json")


def medusa_of(parts: TargetParts, shared_head: bool) -> Files:
    options = {"num_heads": 2, "num_layers": 1, "shared_head": shared_head}
    drafter = MedusaDrafter.from_target(parts, draft_vocab=torch.tensor([2, 7, 30]), **options)
    config = {
        "architectures": ["MedusaDrafter"],
        "vocab_size": 32,
        "draft_vocab_size": 3,
        "feature_layers": [8],
        "options": options,
    }
    return drafter.published(), config


@pytest.fixture
def medusa(deep_parts) -> Files:
    return medusa_of(deep_parts, shared_head=False)


@pytest.fixture
def shared_medusa(deep_parts) -> Files:
    return medusa_of(deep_parts, shared_head=True)


def assert_same(files: Files, expected: Files) -> None:
    assert files[1] == expected[1] and files[0].keys() == expected[0].keys()
    assert all(torch.equal(files[0][name], expected[0][name]) for name in files[0])


@pytest.mark.parametrize("kind", ["eagle3", "medusa", "shared_medusa"])
def test_what_goes_to_vllm_comes_back(kind, request):
    checkpoint = request.getfixturevalue(kind)
    assert_same(from_vllm(*to_vllm(*checkpoint)), checkpoint)


def test_eagle3_says_its_layers_to_each_engine(eagle3):
    tensors, config = to_vllm(*eagle3)
    assert config[IDS] == [2, 4, 5]  # that the states enter: vLLM's
    assert config["eagle_config"] == {IDS: [1, 3, 4]}  # that they leave: SGLang's
    assert tensors.keys() == eagle3[0].keys()


def test_vllms_own_names_are_read_too(eagle3):
    tensors, config = to_vllm(*eagle3)
    renamed = {
        name.replace("midlayer.", "layers.0.").replace("d2t", "draft_id_to_target_id"): t for name, t in tensors.items()
    }
    assert_same(from_vllm(renamed, config), eagle3)


def test_layers_that_vllm_reads_in_two_ways_are_refused(eagle3):
    with pytest.raises(ValueError, match="stands in eagle_config only"):
        from_vllm(*eagle3)


def test_a_full_vocabulary_has_no_map_and_its_rows_in_order(eagle3):
    tensors, config = eagle3
    ids = torch.randperm(32)
    head = torch.randn(32, 16)
    full = {**tensors, "lm_head.weight": head[ids], "d2t": ids - torch.arange(32)}
    written, config = to_vllm(full, {**config, "draft_vocab_size": 32})
    assert "d2t" not in written and torch.equal(written["lm_head.weight"], head)
    assert from_vllm(written, config)[0]["d2t"].tolist() == [0] * 32


def test_medusa_rows_that_vllm_asks_for_are_never_drafted(medusa):
    tensors, config = to_vllm(*medusa)
    expected = {"model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": 16, "vocab_size": 32}
    shape = {"num_heads": 2, "num_hidden_layers": 1, "original_lm_head": False}
    assert config == expected | shape | {"feature_layers": [8]}
    logits = torch.randn(100, 16) @ tensors["lm_heads.1.weight"].T
    assert logits.argmax(-1).unique().tolist() == [2, 7, 30]


def _without(name: str):
    return lambda tensors, config: ({k: t for k, t in tensors.items() if k != name}, config)


def _with(**tensors: Tensor):
    return lambda written, config: ({**written, **tensors}, config)


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("eagle3", _without("norm.weight"), r"'norm.weight' \(16,\) is missing"),
        ("eagle3", _without("d2t"), "'d2t'.* is missing"),
        ("eagle3", _with(new=torch.zeros(1)), "'new' is unknown"),
        ("eagle3", _with(d2t=torch.arange(4)), r"'d2t' must have shape \(3,\), got \(4,\)"),
        ("eagle3", lambda t, c: (t, {**c, "fc_norm": True}), "'fc_norm.0.weight' .* is missing"),
        ("eagle3", lambda t, c: (t, {**c, "eagle_config": {IDS: [3, 1]}}), "must rise"),
        ("eagle3", lambda t, c: (t, {**c, "architectures": ["LlamaForCausalLM"]}), "names 'LlamaForCausalLM'"),
        ("medusa", _without("lm_heads.0.weight"), "'lm_heads.0.weight' is missing"),
        ("medusa", _with(new=torch.zeros(1)), "'new' is unknown"),
        ("shared_medusa", _without("lm_heads.0.weight"), "'lm_heads.0.weight' is missing"),
        ("shared_medusa", _with(**{"lm_heads.1.weight": torch.zeros(3, 16)}), "'lm_heads.1.weight' is unknown"),
    ],
)
def test_what_vllm_would_not_serve_as_it_was_is_refused(kind, spoil, message, request):
    with pytest.raises(ValueError, match=message):
        to_vllm(*spoil(*request.getfixturevalue(kind)))


# Of EAGLE-3 others than its own.
LAYERS = {"eagle3": (0, 1, 2), "medusa": None}


@pytest.mark.parametrize("name", ["eagle3", "medusa"])
def test_vllms_folders_are_told_by_what_they_say(parts: TargetParts, tmp_path: Path, name: str) -> None:
    """Nobody says of a ``drafter.path`` in which format it is."""
    drafter = get_drafter(name).from_target(parts, draft_vocab=torch.arange(0, 32, 2), feature_layers=LAYERS[name])
    save_drafter(drafter, tmp_path / "vllm", "vllm")
    if name == "eagle3":  # as others write it: the layers at the top level alone
        edit_config(tmp_path / "vllm", eagle_config=None)
    read = load_drafter(tmp_path / "vllm", parts)
    batch = pack([tiny_trajectory(drafter)])
    assert read.feature_layers == drafter.feature_layers
    assert torch.equal(read.score(batch), drafter.score(batch))


def test_a_token_map_outside_the_vocabulary_is_named(parts: TargetParts, tmp_path: Path) -> None:
    drafter = MedusaDrafter.from_target(parts, draft_vocab=torch.arange(4))
    save_drafter(drafter, tmp_path / "drafter", "vllm")
    edit_tensors(tmp_path / "drafter", token_map=torch.tensor([0, 1, 2, 99]))
    with pytest.raises(CheckpointError, match="tensor 'token_map' points outside .* row 3 is token 99"):
        load_drafter(tmp_path / "drafter", parts, format="vllm")
