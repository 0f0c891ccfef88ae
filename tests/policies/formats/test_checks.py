"""What is checked of a drafter's config.json; tests of whole folders are in test_files.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from drafters import edit_config

from aurora_rl.models.parts import layer_config
from aurora_rl.policies import Eagle3Drafter, TargetParts, get_drafter
from aurora_rl.policies.formats.checks import settle_attention
from aurora_rl.policies.formats.files import load_drafter, save_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.trajectories import pack


def test_a_checkpoint_whose_positions_depend_on_the_pass_is_refused() -> None:
    parts = TargetParts.of(tiny_target())
    config = layer_config(parts)
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rope_type is 'longrope', which turns keys by the length of the pass"):
        settle_attention(config, {}, parts, "own")


@pytest.fixture
def llama3() -> TargetParts:
    """Parts of a target with the RoPE base of Llama 3."""
    model = tiny_target(dtype=torch.float32)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    return TargetParts.of(model)


def test_the_authors_files_keep_the_rope_that_they_were_trained_with(
    parts: TargetParts, llama3: TargetParts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8))  # base 10000
    save_drafter(drafter, tmp_path / "published")
    entries = {  # those of yuhuili/EAGLE3-LLaMA3.1-Instruct-8B: no rotary settings
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 32, "max_position_embeddings": 2048,
        "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
        "pad_token_id": 0, "rms_norm_eps": drafter.config.rms_norm_eps, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.28.1", "use_cache": True, "vocab_size": 32,
        "draft_vocab_size": 8, "head_dim": 4,
    }  # fmt: skip
    (tmp_path / "published" / "config.json").write_text(json.dumps(entries))
    read = load_drafter(tmp_path / "published", llama3)
    assert "the default of its authors, {'rope_theta': 10000.0, 'rope_type': 'default'}" in caplog.text
    batch = pack([tiny_trajectory(drafter)])
    assert torch.equal(read.score(batch), drafter.score(batch))
    # Once read, it is known to be its own: a run and an export hand it on as it was.
    save_drafter(read, tmp_path / "again")
    again = load_drafter(tmp_path / "again", llama3)
    assert torch.equal(again.score(batch), drafter.score(batch))


@pytest.mark.parametrize("name", ["eagle3", "eagle"])
def test_rope_that_a_file_states_is_the_targets_or_asked_for(
    parts: TargetParts, llama3: TargetParts, tmp_path: Path, name: str
) -> None:
    drafter = get_drafter(name).from_target(parts, draft_vocab=torch.arange(8))
    save_drafter(drafter, tmp_path / "drafter")
    with pytest.raises(CheckpointError, match="'rope_theta': 10000.0.* set drafter.options={attention: own}"):
        load_drafter(tmp_path / "drafter", llama3)
    read = load_drafter(tmp_path / "drafter", llama3, options={"attention": "own"})
    batch = pack([tiny_trajectory(drafter)])
    assert torch.equal(read.score(batch), drafter.score(batch))
    with pytest.raises(CheckpointError, match="the option attention must be target or own, got 'mine'"):
        load_drafter(tmp_path / "drafter", llama3, options={"attention": "mine"})
    with pytest.raises(ValueError, match="attention='own' is for a checkpoint"):
        get_drafter(name).from_target(parts, draft_vocab=torch.arange(8), attention="own")


@pytest.mark.parametrize("name", ["eagle3", "eagle", "dflash"])
def test_a_folder_that_does_not_say_its_heads_is_refused(parts: TargetParts, tmp_path: Path, name: str) -> None:
    """Llama's default of 32 would cut the same tensors in another way."""
    save_drafter(get_drafter(name).from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    del config["num_attention_heads"]
    (tmp_path / "drafter" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_attention_heads is missing"):
        load_drafter(tmp_path / "drafter", parts)


@pytest.mark.parametrize("name", ["eagle3", "eagle"])
def test_heads_of_its_own_are_taken_where_they_are_meant(parts: TargetParts, tmp_path: Path, name: str) -> None:
    drafter = get_drafter(name).from_target(parts, draft_vocab=torch.arange(8))
    weights = drafter.published()
    drafter.install({n: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t for n, t in weights.items()})
    save_drafter(drafter, tmp_path / "drafter")
    edit_config(tmp_path / "drafter", num_attention_heads=8, num_key_value_heads=4, head_dim=2)
    batch = pack([tiny_trajectory(drafter)])
    with pytest.raises(CheckpointError, match="num_attention_heads is 8, the target has 4"):
        load_drafter(tmp_path / "drafter", parts)
    read = load_drafter(tmp_path / "drafter", parts, options={"attention": "own"})
    assert not torch.allclose(read.score(batch), drafter.score(batch)), "heads are cut as the file says"
    save_drafter(read, tmp_path / "again")
    assert torch.equal(load_drafter(tmp_path / "again", parts).score(batch), read.score(batch))


@pytest.mark.parametrize("name", ["eagle3", "eagle", "dflash", "standalone"])
def test_older_engines_read_rope_and_dtype_too(tmp_path: Path, name: str) -> None:
    model = tiny_target(dtype=torch.float32)
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model.config.rope_parameters = {"rope_theta": 500000.0, **scaling}
    model.config.eos_token_id = 7
    parts = TargetParts.of(model)
    save_drafter(get_drafter(name).from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, scaling)
    assert config["rope_parameters"] == {"rope_theta": 500000.0, **scaling}
    assert config["torch_dtype"] == config["dtype"] == "float32" and config["eos_token_id"] == 7
    edit_config(tmp_path / "drafter", max_position_embeddings=512 if name == "standalone" else 64)
    read = load_drafter(tmp_path / "drafter", parts)
    assert read.config.rope_parameters == model.config.rope_parameters
    assert read.config.max_position_embeddings == 512


@pytest.mark.parametrize("format", ["sglang", "vllm"])
@pytest.mark.parametrize(
    ("layers", "message"),
    [((1, 3), "feature_layers has 3"), ((2, 1), "must rise"), ((1, 1), "must rise"), ((1, 9), "feature_layers has 9")],
)
def test_layers_that_engines_cannot_read_are_not_exported(
    parts: TargetParts, tmp_path: Path, layers: tuple[int, ...], message: str, format: str
) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8), feature_layers=layers)
    with pytest.raises(CheckpointError, match=message):
        save_drafter(drafter, tmp_path / "drafter", format)
