"""Drafter checkpoints: what is written is what engines read, and what is read drafts as it did."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict

from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs.sglang.client import drafter_arguments
from aurora_rl.policies import (
    Drafter,
    Eagle3Drafter,
    MedusaDrafter,
    NgramDrafter,
    TargetParts,
    get_drafter,
)
from aurora_rl.policies.formats.files import load_drafter, save_drafter
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.training.checkpoint import CheckpointError
from aurora_rl.trajectories import pack

# What SGLang's LlamaForCausalLMEagle3 and SpecForge's checkpoints hold, less the target's embedding.
NAMES = {
    "fc.weight", "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight", "midlayer.mlp.down_proj.weight",
    "midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight", "midlayer.post_attention_layernorm.weight",
    "midlayer.self_attn.k_proj.weight", "midlayer.self_attn.o_proj.weight", "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.v_proj.weight", "norm.weight", "lm_head.weight", "d2t", "t2d",
}  # fmt: skip


# Of EAGLE-3 others than its own.
LAYERS = {"eagle3": (0, 1, 2), "medusa": None}


@pytest.fixture
def parts() -> TargetParts:
    return TargetParts.of(tiny_target(dtype=torch.float32))


@pytest.fixture
def saved(parts: TargetParts, tmp_path: Path) -> tuple[Eagle3Drafter, Path]:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.tensor([2, 7, 11, 30]))
    drafter.install(
        {name: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t for name, t in drafter.published().items()}
    )
    save_drafter(drafter, tmp_path / "drafter")
    return drafter, tmp_path / "drafter"


def test_a_folder_holds_what_engines_read(saved: tuple[Eagle3Drafter, Path]) -> None:
    drafter, folder = saved
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == NAMES
    assert tensors["d2t"].tolist() == [2, 6, 9, 27]  # target id less row
    assert tensors["t2d"].dtype == torch.bool and tensors["t2d"].nonzero().flatten().tolist() == [2, 7, 11, 30]
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "draft_vocab_size": 4, "vocab_size": 32,
        "hidden_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 4, "dtype": "float32",
        "tie_word_embeddings": False, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [-1, 0]},
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected


def test_what_is_read_scores_as_what_was_written(saved: tuple[Eagle3Drafter, Path], parts: TargetParts) -> None:
    drafter, folder = saved
    read = load_drafter(folder, parts)
    published = read.published()
    assert published.keys() == drafter.published().keys()
    assert all(torch.equal(published[name], tensor) for name, tensor in drafter.published().items())
    assert read.feature_layers == drafter.feature_layers
    batch = pack([tiny_trajectory(drafter)])
    assert torch.equal(read.score(batch), drafter.score(batch))


def test_lower_precision_is_read_in_float32(parts: TargetParts, tmp_path: Path) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(4)).bfloat16()
    save_drafter(drafter, tmp_path / "drafter")
    assert json.loads((tmp_path / "drafter" / "config.json").read_text())["dtype"] == "bfloat16"
    read = load_drafter(str(tmp_path / "drafter"), parts)
    assert read.fc.weight.dtype == torch.float32
    assert torch.equal(read.fc.weight, drafter.fc.weight.float())


def test_an_embedding_in_the_folder_is_passed_over(saved: tuple[Eagle3Drafter, Path], parts: TargetParts) -> None:
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "embed_tokens.weight": torch.zeros(32, 16)}, folder / "model.safetensors")
    assert torch.equal(load_drafter(folder, parts).embedding, parts.embedding)


def change_config(folder: Path, **entries) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": 32, "vocab_size": 9}, "config.json: hidden_size is 32, the target has 16"),
        ({"vocab_size": 33}, "config.json: vocab_size is 33, the target has 32"),
        ({"rms_norm_eps": "tiny"}, "config.json: .*rms_norm_eps"),
        ({"norm_before_residual": True}, "norm_before_residual is set, which this drafter has no form for"),
        ({"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}}, "'rope_theta': 77.0.*the target has"),
        ({"architectures": ["BertForMaskedLM"]}, r"no drafter is of architectures \['BertForMaskedLM'\]"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, the target has 2; .*options={attention: own}"),
        # Of the same shapes: only what the file says tells them.
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2},
            "num_attention_heads is 8, the target has",
        ),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, this drafter has one layer"),
        ({"draft_vocab_size": 9}, "draft_vocab_size is 9, the draft map has 4"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1]}}, r"'fc.weight' has shape \(16, 32\)"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 0]}}, r"feature_layers must rise, got \(1, 0\)"),
    ],
)
def test_another_targets_drafter_is_refused_by_name(
    saved: tuple[Eagle3Drafter, Path], parts: TargetParts, entries: dict, message: str
) -> None:
    change_config(saved[1], **entries)
    with pytest.raises(CheckpointError, match=message):
        load_drafter(saved[1], parts)


@pytest.mark.parametrize("name", ["d2t", "norm.weight", "midlayer.self_attn.q_proj.weight"])
def test_a_missing_tensor_is_named(saved: tuple[Eagle3Drafter, Path], parts: TargetParts, name: str) -> None:
    tensors = load_file(saved[1] / "model.safetensors")
    del tensors[name]
    save_file(tensors, saved[1] / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{name}'.* is missing"):
        load_drafter(saved[1], parts)


def test_an_unknown_tensor_is_named(saved: tuple[Eagle3Drafter, Path], parts: TargetParts) -> None:
    tensors = load_file(saved[1] / "model.safetensors")
    save_file({**tensors, "midlayer.self_attn.q_norm.weight": torch.ones(4)}, saved[1] / "model.safetensors")
    with pytest.raises(CheckpointError, match="'midlayer.self_attn.q_norm.weight' is unknown"):
        load_drafter(saved[1], parts)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_broken_and_missing_files_are_named(saved: tuple[Eagle3Drafter, Path], parts: TargetParts, name: str) -> None:
    (saved[1] / name).write_text("{")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_drafter(saved[1], parts)
    (saved[1] / name).unlink()
    with pytest.raises(CheckpointError, match="give a folder with model.safetensors and config.json"):
        load_drafter(saved[1], parts)


def test_a_public_checkpoint_loads_as_its_authors_wrote_it(
    saved: tuple[Eagle3Drafter, Path], parts: TargetParts
) -> None:
    """Older files: pytorch_model.bin, other names of the layer, rope_theta, no feature layers, a short context."""
    drafter, folder = saved
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(
        {f"model.{name}".replace("midlayer.", "layers.0."): t for name, t in tensors.items()},
        folder / "pytorch_model.bin",
    )
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    del config["eagle_config"]
    config |= {"architectures": ["LlamaForCausalLM"], "rope_theta": theta, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    read = load_drafter(folder, parts)
    assert isinstance(read, Eagle3Drafter) and read.feature_layers == drafter.feature_layers
    assert read.config.max_position_embeddings == parts.config.max_position_embeddings == 512
    batch = pack([tiny_trajectory(drafter)])
    assert torch.equal(read.score(batch), drafter.score(batch))


@pytest.fixture
def llama3() -> TargetParts:
    """Of a target with the base of Llama 3."""
    model = tiny_target(dtype=torch.float32)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    return TargetParts.of(model)


def test_the_authors_files_keep_the_rope_that_they_were_trained_with(
    parts: TargetParts, llama3: TargetParts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8))  # base 10000
    save_drafter(drafter, tmp_path / "theirs")
    entries = {  # those of yuhuili/EAGLE3-LLaMA3.1-Instruct-8B: no rotary settings
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 32, "max_position_embeddings": 2048,
        "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
        "pad_token_id": 0, "rms_norm_eps": drafter.config.rms_norm_eps, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.28.1", "use_cache": True, "vocab_size": 32,
        "draft_vocab_size": 8, "head_dim": 4,
    }  # fmt: skip
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(entries))
    read = load_drafter(tmp_path / "theirs", llama3)
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


def test_a_pickle_of_anything_but_tensors_is_refused(saved: tuple[Eagle3Drafter, Path], parts: TargetParts) -> None:
    folder = saved[1]
    (folder / "model.safetensors").unlink()
    torch.save({"fc.weight": Path("/")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_drafter(folder, parts)


def rewrite(folder: Path, **changed: torch.Tensor) -> None:
    save_file({**load_file(folder / "model.safetensors"), **changed}, folder / "model.safetensors")


def test_bad_draft_maps_are_named(saved: tuple[Eagle3Drafter, Path], parts: TargetParts) -> None:
    folder, rows = saved[1], torch.arange(4)
    for ids, message in (
        ([2, 7, 11, 32], "points outside the target's vocabulary of 32: row 3 is token 32"),
        ([-1, 7, 11, 30], "points outside the target's vocabulary of 32: row 0 is token -1"),
        ([2, 7, 7, 30], "gives token 7 more than one row"),
        ([2, 11, 7, 30], "is not rising: row 1 is token 11, row 2 token 7"),
        ([2, 7, 11, 29], "'t2d' and 'd2t' name different draft vocabularies"),
    ):
        rewrite(folder, d2t=torch.tensor(ids) - rows)
        with pytest.raises(CheckpointError, match=message):
            load_drafter(folder, parts)


@pytest.mark.parametrize("name", ["eagle3", "eagle", "medusa", "dflash"])
def test_a_map_that_does_not_rise_is_neither_written_nor_read_nor_swapped_in(
    parts: TargetParts, tmp_path: Path, name: str
) -> None:
    kind, message = get_drafter(name), "is not rising: row 1 is token 11, row 2 token 7"
    rising, falling = torch.tensor([2, 7, 11, 30]), torch.tensor([2, 11, 7, 30])
    with pytest.raises(CheckpointError, match=message):
        save_drafter(kind.from_target(parts, draft_vocab=falling), tmp_path / "never")
    drafter = kind.from_target(parts, draft_vocab=rising)
    with pytest.raises(ValueError, match=message):
        drafter.install({**drafter.published(), "d2t": falling - torch.arange(4)})
    assert torch.equal(drafter.draft_vocab, rising)
    save_drafter(drafter, tmp_path / "drafter")
    rewrite(tmp_path / "drafter", d2t=falling - torch.arange(4))
    with pytest.raises(CheckpointError, match=message):
        load_drafter(tmp_path / "drafter", parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.float8_e4m3fn), "'norm.weight' is torch.float8_e4m3fn, quantized without a scale"),
        (lambda t: t.to(torch.int8), "'norm.weight' is torch.int8, this drafter needs floating-point numbers"),
        (lambda t: t / 0, "'norm.weight' holds values that are not finite"),
        (lambda t: t * torch.nan, "'norm.weight' holds values that are not finite"),
    ],
)
def test_weights_that_are_none_are_named(
    saved: tuple[Eagle3Drafter, Path], parts: TargetParts, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    folder = saved[1]
    rewrite(folder, **{"norm.weight": change(load_file(folder / "model.safetensors")["norm.weight"])})
    with pytest.raises(CheckpointError, match=message):
        load_drafter(folder, parts)


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
    change_config(tmp_path / "drafter", num_attention_heads=8, num_key_value_heads=4, head_dim=2)
    batch = pack([tiny_trajectory(drafter)])
    with pytest.raises(CheckpointError, match="num_attention_heads is 8, the target has 4"):
        load_drafter(tmp_path / "drafter", parts)
    read = load_drafter(tmp_path / "drafter", parts, options={"attention": "own"})
    assert not torch.allclose(read.score(batch), drafter.score(batch)), "heads are cut as the file says"
    save_drafter(read, tmp_path / "again")
    assert torch.equal(load_drafter(tmp_path / "again", parts).score(batch), read.score(batch))


@pytest.mark.parametrize("name", ["eagle3", "medusa"])
def test_vllms_folders_are_told_by_what_they_say(parts: TargetParts, tmp_path: Path, name: str) -> None:
    """Nobody says of a ``drafter.path`` in which layout it is."""
    drafter = get_drafter(name).from_target(parts, draft_vocab=torch.arange(0, 32, 2), feature_layers=LAYERS[name])
    save_drafter(drafter, tmp_path / "vllm", "vllm")
    if name == "eagle3":  # as others write it: the layers at the top level alone
        change_config(tmp_path / "vllm", eagle_config=None)
    read = load_drafter(tmp_path / "vllm", parts)
    batch = pack([tiny_trajectory(drafter)])
    assert read.feature_layers == drafter.feature_layers
    assert torch.equal(read.score(batch), drafter.score(batch))


@pytest.mark.parametrize("options", [{}, {"fc_norm": True}, {"norm_output": True}])
def test_settings_of_eagle_3_1_are_kept(parts: TargetParts, tmp_path: Path, options: dict) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8), **options)
    save_drafter(drafter, tmp_path / "drafter")
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert {name: config[name] for name in ("fc_norm", "norm_output") if name in config} == options
    assert load_drafter(tmp_path / "drafter", parts).options == drafter.options
    with pytest.raises(CheckpointError, match="option fc_norm is .* there, .* is asked for"):
        load_drafter(tmp_path / "drafter", parts, options={"fc_norm": not options.get("fc_norm", False)})


class OtherHeads(MedusaDrafter):
    """A drafter that has no name, only its import path."""


@pytest.mark.parametrize("make", [MedusaDrafter, OtherHeads])
def test_other_architectures_come_back_from_their_folder(
    parts: TargetParts, tmp_path: Path, make: type[Drafter]
) -> None:
    drafter = make.from_target(parts, draft_vocab=torch.arange(0, 32, 3))
    save_drafter(drafter, tmp_path / "drafter")
    read = load_drafter(tmp_path / "drafter", parts, make)
    batch = pack([tiny_trajectory(drafter)])
    assert type(read) is make and torch.equal(read.score(batch), drafter.score(batch))


def test_a_folder_of_a_drafter_without_a_name_needs_its_class(parts: TargetParts, tmp_path: Path) -> None:
    save_drafter(OtherHeads.from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    with pytest.raises(
        CheckpointError, match=r"\['OtherHeads'\]; there are .* drafter.name=package.module:Class names"
    ):
        load_drafter(tmp_path / "drafter", parts)
    save_drafter(Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    with pytest.raises(CheckpointError, match="config.json is of Eagle3Drafter, and OtherHeads is asked for"):
        load_drafter(tmp_path / "drafter", parts, OtherHeads)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eagle3", {"norm_output": True}),
        ("eagle3", {"fc_norm": True}),
        ("medusa", {"num_heads": 6}),
        ("dflash", {"block_size": 4, "mask_token_id": None}),
        ("standalone", {"num_layers": 3}),
    ],
)
def test_a_run_loads_what_it_started_with_by_the_same_options(
    parts: TargetParts, tmp_path: Path, name: str, options: dict
) -> None:
    """What the server of a flywheel saves, its learner reads."""
    drafter = get_drafter(name).from_target(parts, draft_vocab=torch.arange(8), **options)
    save_drafter(drafter, tmp_path / "drafter")
    read = load_drafter(tmp_path / "drafter", parts, type(drafter), options=options)
    assert read.options == drafter.options


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eagle3", "num_target_layers is 3, the target has 5"),
        ("eagle", "num_target_layers is 3, the target has 5"),
        ("dflash", "num_target_layers is 3, the target has 5"),
        ("medusa", r"Medusa reads what the target's head reads, feature_layers=\(5,\), got \(3,\)"),
    ],
)
def test_a_drafter_of_a_target_of_other_layers_is_refused(
    parts: TargetParts, tmp_path: Path, name: str, message: str
) -> None:
    save_drafter(get_drafter(name).from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    deeper = TargetParts.of(tiny_target(num_layers=5, dtype=torch.float32))
    with pytest.raises(CheckpointError, match=message):
        load_drafter(tmp_path / "drafter", deeper)


def test_a_standalone_drafter_serves_targets_of_any_depth(parts: TargetParts, tmp_path: Path) -> None:
    save_drafter(get_drafter("standalone").from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    load_drafter(tmp_path / "drafter", TargetParts.of(tiny_target(num_layers=5, dtype=torch.float32)))


def test_a_standalone_drafter_of_one_layer_is_no_eagle(parts: TargetParts, tmp_path: Path) -> None:
    drafter = get_drafter("standalone").from_target(parts, draft_vocab=torch.arange(8), num_layers=1)
    save_drafter(drafter, tmp_path / "drafter")
    assert type(load_drafter(tmp_path / "drafter", parts)) is type(drafter)
    with pytest.raises(CheckpointError, match="config.json is of StandaloneDrafter, and EagleDrafter is asked for"):
        load_drafter(tmp_path / "drafter", parts, get_drafter("eagle"))


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
    change_config(tmp_path / "drafter", max_position_embeddings=512 if name == "standalone" else 64)
    read = load_drafter(tmp_path / "drafter", parts)
    assert read.config.rope_parameters == model.config.rope_parameters
    assert read.config.max_position_embeddings == 512


def test_layers_that_the_target_lacks_are_named(saved: tuple[Eagle3Drafter, Path], parts: TargetParts) -> None:
    change_config(saved[1], eagle_config={"eagle_aux_hidden_state_layer_ids": [40, 41]})
    with pytest.raises(CheckpointError, match=r"reads what enters layer 41, and the target has 0\.\.3"):
        load_drafter(saved[1], parts)


@pytest.mark.parametrize("layout", ["sglang", "vllm"])
@pytest.mark.parametrize(
    ("layers", "message"),
    [((1, 3), "feature_layers has 3"), ((2, 1), "must rise"), ((1, 1), "must rise"), ((1, 9), "feature_layers has 9")],
)
def test_layers_that_engines_cannot_capture_are_not_exported(
    parts: TargetParts, tmp_path: Path, layers: tuple[int, ...], message: str, layout: str
) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8), feature_layers=layers)
    with pytest.raises(CheckpointError, match=message):
        save_drafter(drafter, tmp_path / "drafter", layout)


def test_what_sglang_cannot_capture_is_kept_but_not_exported(parts: TargetParts, tmp_path: Path) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8))
    save_drafter(drafter, tmp_path / "run")
    assert load_drafter(tmp_path / "run", parts).feature_layers == drafter.feature_layers == (0, 1)
    message = r"reads layers \(0, 1\), and SGLang cannot capture what enters layer 0; .* drafter.feature_layers=\[1,2\]"
    with pytest.raises(CheckpointError, match=message):
        save_drafter(drafter, tmp_path / "sglang", "sglang")
    assert not (tmp_path / "sglang").exists()
    save_drafter(drafter, tmp_path / "vllm", "vllm")  # which can
    with pytest.raises(
        CheckpointError, match="run: the drafter reads what enters layer 0, which SGLang cannot capture"
    ):
        drafter_arguments(tmp_path / "run", tmp_path / "token_map.pt")


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_that_the_umask_says(
    parts: TargetParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.umask(umask)
    try:
        drafter = MedusaDrafter.from_target(parts, draft_vocab=torch.arange(8))
        save_drafter(drafter, "drafter")  # a path may be a string
        TrajectoryDataset("stream").append(TensorDict({"request": torch.tensor(1)}))
    finally:
        os.umask(before)
    files = [*Path("drafter").iterdir(), *Path("stream").iterdir()]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == dict.fromkeys(
        ("config.json", "model.safetensors", "000000.safetensors"), 0o666 & ~umask
    )
    assert type(load_drafter("drafter", parts)) is MedusaDrafter


def test_an_option_that_differs_is_named(parts: TargetParts, tmp_path: Path) -> None:
    save_drafter(MedusaDrafter.from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    with pytest.raises(CheckpointError, match="option num_heads is 4 there, 6 is asked for"):
        load_drafter(tmp_path / "drafter", parts, options={"num_heads": 6, "num_layers": 1})


def test_what_cannot_be_written_is_said(parts: TargetParts, tmp_path: Path) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8), feature_layers=(0, 2))
    with pytest.raises(CheckpointError, match="Eagle3Drafter has no format 'gguf'; it has sglang, vllm, hf"):
        save_drafter(drafter, tmp_path / "drafter", "gguf")
    with pytest.raises(CheckpointError, match=r"reads layers \(0, 2\), and files in 'hf' are of \(0, 1\)"):
        save_drafter(drafter, tmp_path / "drafter", "hf")
    with pytest.raises(CheckpointError, match="NgramDrafter has no format 'any'; it has none"):
        save_drafter(NgramDrafter(32), tmp_path / "drafter")
    assert not (tmp_path / "drafter").exists()


def test_only_a_drafter_is_replaced(saved: tuple[Eagle3Drafter, Path], tmp_path: Path) -> None:
    drafter, folder = saved
    (tmp_path / "precious").mkdir()
    save_drafter(drafter, tmp_path / "precious")  # empty
    save_drafter(drafter, folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("mine")
    with pytest.raises(CheckpointError, match="thesis holds other things than a drafter .*which would be lost"):
        save_drafter(drafter, tmp_path / "thesis")
    with pytest.raises(CheckpointError, match="config.json is a file; name a folder"):
        save_drafter(drafter, tmp_path / "thesis" / "config.json")
    assert (tmp_path / "thesis" / "config.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("eagle3", {"architectures": [3]}, r"architectures must be a list of str, got \[3\]"),
        ("eagle3", {"architectures": "LlamaForCausalLMEagle3"}, "architectures must be a list of str"),
        ("eagle3", {"eagle_config": "none"}, "eagle_config must be an object, got 'none'"),
        (
            "eagle3",
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ["1", 2]}},
            "eagle_aux_hidden_state_layer_ids must be a list of int",
        ),
        ("dflash", {"dflash_config": "none"}, "dflash_config must be an object"),
        ("dflash", {"dflash_config": {"target_layer_ids": 1}}, "target_layer_ids must be a list of int, got 1"),
        ("medusa", {"options": None}, "lacks an entry, or has one of another type: TypeError"),
        ("medusa", {"options": {"num_wings": 2}}, "lacks an entry, or has one of another type: .*num_wings"),
        ("medusa", {"options": {"num_heads": "4"}}, "lacks an entry, or has one of another type: TypeError"),
        ("medusa", {"feature_layers": None}, "lacks an entry, or has one of another type: TypeError"),
    ],
)
def test_malformed_entries_are_named(
    parts: TargetParts, tmp_path: Path, name: str, entries: dict, message: str
) -> None:
    save_drafter(get_drafter(name).from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    change_config(tmp_path / "drafter", **entries)
    with pytest.raises(CheckpointError, match=f"drafter: .*{message}"):
        load_drafter(tmp_path / "drafter", parts)


@pytest.mark.parametrize("document", ["[1]", "null", '"drafter"'])
def test_a_document_of_another_type_is_named(
    saved: tuple[Eagle3Drafter, Path], parts: TargetParts, document: str
) -> None:
    (saved[1] / "config.json").write_text(document)
    with pytest.raises(CheckpointError, match="config.json must hold an object"):
        load_drafter(saved[1], parts)


@pytest.mark.parametrize(
    "offsets", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.bool), torch.zeros(0)]
)
def test_a_draft_map_of_another_type_is_named(
    saved: tuple[Eagle3Drafter, Path], parts: TargetParts, offsets: torch.Tensor
) -> None:
    rewrite(saved[1], d2t=offsets)
    with pytest.raises(CheckpointError, match="tensor 'd2t' must hold an integer for each row"):
        load_drafter(saved[1], parts)


def test_a_token_map_outside_the_vocabulary_is_named(parts: TargetParts, tmp_path: Path) -> None:
    drafter = MedusaDrafter.from_target(parts, draft_vocab=torch.arange(4))
    save_drafter(drafter, tmp_path / "drafter", "vllm")
    rewrite(tmp_path / "drafter", token_map=torch.tensor([0, 1, 2, 99]))
    with pytest.raises(CheckpointError, match="tensor 'token_map' points outside .* row 3 is token 99"):
        load_drafter(tmp_path / "drafter", parts, layout="vllm")


def test_neither_a_folder_nor_on_the_hub(parts: TargetParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="nobody/nothing is neither a folder nor a repository of the hub"):
        load_drafter("nobody/nothing", parts)


def tuned(part: str) -> TargetParts:
    """Of the tiny target, further trained in one place."""
    model = tiny_target(dtype=torch.float32)
    model.get_parameter(part).add_(0.01 * torch.randn_like(model.get_parameter(part)))
    return TargetParts.of(model)


@pytest.mark.parametrize("part", ["lm_head.weight", "model.layers.2.mlp.up_proj.weight"])
@pytest.mark.parametrize("name", ["eagle3", "eagle", "medusa", "dflash", "standalone"])
def test_a_drafter_of_a_target_of_other_weights_is_refused_unless_asked_for(
    parts: TargetParts, tmp_path: Path, name: str, part: str
) -> None:
    drafter, other = get_drafter(name).from_target(parts, draft_vocab=torch.arange(8)), tuned(part)
    drafter.made_for = parts.fingerprint
    for layout in drafter.formats:
        if layout == "sglang" and name == "dflash":
            continue  # whose default layers are too few in a tiny target
        folder = tmp_path / layout
        # EAGLE-3's are those that a run keeps and SGLang cannot capture.
        asked = None if (name, layout) == ("eagle3", "sglang") else layout
        save_drafter(drafter, folder, asked)
        wrong = (
            f"{folder}: config.json: aurora_rl_made_for is '{parts.fingerprint}', the target's weights are "
            f"'{other.fingerprint}': .* set drafter.made_for=any"
        )
        with pytest.raises(CheckpointError, match=wrong):
            load_drafter(folder, other, type(drafter), layout=layout)
        assert load_drafter(folder, parts, type(drafter), layout=layout).made_for == parts.fingerprint
        # From then on it is the other target's.
        read = load_drafter(folder, other, type(drafter), layout=layout, made_for="any")
        save_drafter(read, tmp_path / "again", asked)
        load_drafter(tmp_path / "again", other, type(drafter), layout=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_same_target_in_another_dtype_is_the_same(parts: TargetParts, tmp_path: Path, dtype: torch.dtype) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8))
    drafter.made_for = parts.fingerprint
    save_drafter(drafter, tmp_path / "drafter")
    load_drafter(tmp_path / "drafter", TargetParts.of(tiny_target(dtype=dtype)))


def test_a_folder_that_names_no_target_is_read_and_named_when_saved(
    saved: tuple[Eagle3Drafter, Path], tmp_path: Path
) -> None:
    other = tuned("lm_head.weight")
    assert "aurora_rl_made_for" not in json.loads((saved[1] / "config.json").read_text())
    save_drafter(load_drafter(saved[1], other), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["aurora_rl_made_for"] == other.fingerprint
