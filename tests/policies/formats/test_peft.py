"""Adapters in a drafter's folder: in PEFT's form, next to a drafter that engines load as before."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_rl.policies import Drafter, Eagle3Drafter, TargetParts
from aurora_rl.policies.adapters import adapted_layers, add_adapters, merge_adapter
from aurora_rl.policies.formats.files import holds_drafter, load_drafter, save_drafter
from aurora_rl.policies.formats.peft import adapter_ranks, read_adapters
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_target

NAMES = ("acme", "globex:eu")


def parts() -> TargetParts:
    return TargetParts.of(tiny_target(dtype=torch.float32))


def fresh() -> Drafter:
    torch.manual_seed(0)
    return Eagle3Drafter.from_target(parts(), draft_vocab=torch.arange(16))


@pytest.fixture
def learned() -> Drafter:
    drafter = fresh()
    add_adapters(drafter, NAMES, rank=2)
    for layer in adapted_layers(drafter).values():
        torch.nn.init.normal_(layer.lora_B)
    return drafter


@pytest.fixture
def folder(learned: Drafter, tmp_path: Path) -> Path:
    save_drafter(learned, tmp_path / "drafter")
    return tmp_path / "drafter"


def test_a_folder_is_the_shared_drafter_and_its_adapters(learned: Drafter, folder: Path, tmp_path: Path) -> None:
    save_drafter(merge_adapter(learned), tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):  # what engines read of it is as without adapters
        assert (folder / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert holds_drafter(folder) and adapter_ranks(folder) == {"acme": 2, "globex:eu": 2}
    read = load_drafter(folder, parts())
    assert read.adapters is None
    read_adapters(read, folder, NAMES, 2)
    assert read.adapters == learned.adapters
    expected = learned.published()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.published().items())
    save_drafter(merge_adapter(learned), folder)  # replaced, the adapters with it
    assert adapter_ranks(folder) == {}


def test_an_adapter_has_the_names_of_peft_and_is_the_delta(learned: Drafter, folder: Path) -> None:
    config = json.loads((folder / "adapters" / "acme" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    assert "midlayer.self_attn.q_proj" in config["target_modules"] and "lm_head" not in config["target_modules"]
    tensors = load_file(folder / "adapters" / "acme" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(config["target_modules"])
    delta = tensors["base_model.model.fc.lora_B.weight"] @ tensors["base_model.model.fc.lora_A.weight"]
    alone, shared = merge_adapter(learned, "acme").published(), merge_adapter(learned).published()
    torch.testing.assert_close(alone["fc.weight"], shared["fc.weight"] + delta)
    assert torch.equal(alone["lm_head.weight"], shared["lm_head.weight"])


def test_names_may_be_added_left_out_and_reordered(learned: Drafter, folder: Path) -> None:
    read = fresh()
    read_adapters(read, folder, ("initech", "globex:eu"), 2)
    matrix = adapted_layers(read)["fc"].lora_B
    assert torch.count_nonzero(matrix[0]) == 0
    assert torch.equal(matrix[1], adapted_layers(learned)["fc"].lora_B[1])


def test_adapters_are_read_where_a_save_was_killed_between_its_renames(folder: Path) -> None:
    os.replace(folder, folder.with_name(".drafter-old"))
    assert set(adapter_ranks(folder)) == set(NAMES)
    read_adapters(read := fresh(), folder, NAMES, 2)
    assert torch.count_nonzero(adapted_layers(read)["fc"].lora_B)


def test_what_does_not_fit_is_named(folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"adapters/acme has an adapter of rank 2, not 3; set drafter.adapter_rank=2"
    ):
        read_adapters(fresh(), folder, ["acme"], 3)
    path = folder / "adapters" / "acme" / "adapter_model.safetensors"
    tensors, name = load_file(path), "base_model.model.fc.lora_A.weight"
    wrong = [
        ({**tensors, name: torch.zeros(2, 5)}, rf"{name}' has shape \(2, 5\), this drafter needs \(2, 32\)"),
        (
            {**tensors, name: torch.full((2, 32), torch.nan)},
            rf"{name}' has 64 values that are infinite or not a number",
        ),
        ({key: tensor for key, tensor in tensors.items() if key != name}, rf"{name}' is missing; was it learned on an"),
        ({**tensors, "x": torch.zeros(1)}, r"'x' is unknown to this drafter"),
    ]
    for held, message in wrong:
        save_file(held, path)
        with pytest.raises(CheckpointError, match=message):
            read_adapters(fresh(), folder, ["acme"], 2)
    path.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors cannot be read"):
        read_adapters(fresh(), folder, ["acme"], 2)
    config = path.with_name("adapter_config.json")
    config.write_text(json.dumps({"r": 2, "lora_alpha": 16}))
    with pytest.raises(CheckpointError, match="r must be an integer, and lora_alpha the same, got 2, 16"):
        adapter_ranks(folder)
    config.write_text(json.dumps({"r": 2, "lora_alpha": 2, "use_rslora": True, "alpha_pattern": {"fc": 4}}))
    with pytest.raises(CheckpointError, match="sets use_rslora, alpha_pattern, which is not supported"):
        adapter_ranks(folder)
    for text in ("{", "[]"):
        config.write_text(text)
        with pytest.raises(CheckpointError, match="adapter_config.json is no adapter's"):
            adapter_ranks(folder)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config.json is no adapter's"):
        adapter_ranks(folder)
