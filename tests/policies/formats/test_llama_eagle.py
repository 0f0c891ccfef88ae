"""EAGLE and EAGLE-3 folders: names and shapes that engines load, those of their authors, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from drafters import edit_config, edit_tensors, perturbed
from safetensors.torch import load_file, save_file
from torch import Tensor

from aurora_rl.policies import Eagle3Drafter, EagleDrafter, TargetParts
from aurora_rl.policies.formats.files import load_drafter, save_drafter
from aurora_rl.policies.registry import recognized
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_trajectory
from aurora_rl.trajectories import pack

VOCAB = torch.arange(0, 32, 2)  # half of the tokens are outside

# ---- EAGLE-3 --------------------------------------------------------------------------------------------------------

# What SGLang's LlamaForCausalLMEagle3 and SpecForge's checkpoints hold, less the target's embedding.
NAMES = {
    "fc.weight", "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight", "midlayer.mlp.down_proj.weight",
    "midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight", "midlayer.post_attention_layernorm.weight",
    "midlayer.self_attn.k_proj.weight", "midlayer.self_attn.o_proj.weight", "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.v_proj.weight", "norm.weight", "lm_head.weight", "d2t", "t2d",
}  # fmt: skip


def test_an_eagle3_folder_holds_what_engines_read(saved_eagle3: tuple[Eagle3Drafter, Path]) -> None:
    drafter, folder = saved_eagle3
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


@pytest.mark.parametrize("own", [True, False])
def test_an_embedding_in_the_folder_is_passed_over_which_is_told_where_it_is_another(
    saved_eagle3: tuple[Eagle3Drafter, Path], parts: TargetParts, own: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = saved_eagle3
    tensors = load_file(folder / "model.safetensors")
    embedding = torch.zeros(32, 16) if own else parts.embedding.to(torch.bfloat16)
    save_file({**tensors, "embed_tokens.weight": embedding}, folder / "model.safetensors")
    assert torch.equal(load_drafter(folder, parts).embedding, parts.embedding)
    assert ("an embedding of its own, which is not the target's" in caplog.text) == own


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": 32, "vocab_size": 9}, "config.json: hidden_size is 32, the target has 16"),
        ({"vocab_size": 33}, "config.json: vocab_size is 33, the target has 32"),
        ({"rms_norm_eps": "tiny"}, "config.json: .*rms_norm_eps"),
        (
            {"norm_before_residual": True},
            "norm_before_residual is set, which this drafter does not support; give one without it",
        ),
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
def test_another_targets_eagle3_is_refused_by_name(
    saved_eagle3: tuple[Eagle3Drafter, Path], parts: TargetParts, entries: dict, message: str
) -> None:
    edit_config(saved_eagle3[1], **entries)
    with pytest.raises(CheckpointError, match=message):
        load_drafter(saved_eagle3[1], parts)


def test_a_public_eagle3_loads_as_its_authors_wrote_it(
    saved_eagle3: tuple[Eagle3Drafter, Path], parts: TargetParts
) -> None:
    """Older files: pytorch_model.bin, other names of the layer, rope_theta, no feature layers, a short context."""
    drafter, folder = saved_eagle3
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


def test_bad_draft_maps_are_named(saved_eagle3: tuple[Eagle3Drafter, Path], parts: TargetParts) -> None:
    folder, rows = saved_eagle3[1], torch.arange(4)
    for ids, message in (
        ([2, 7, 11, 32], "points outside the target's vocabulary of 32: row 3 is token 32"),
        ([-1, 7, 11, 30], "points outside the target's vocabulary of 32: row 0 is token -1"),
        ([2, 7, 7, 30], "gives token 7 more than one row"),
        ([2, 11, 7, 30], "is not rising: row 1 is token 11, row 2 token 7"),
        ([2, 7, 11, 29], "'t2d' and 'd2t' name different draft vocabularies"),
    ):
        edit_tensors(folder, d2t=torch.tensor(ids) - rows)
        with pytest.raises(CheckpointError, match=message):
            load_drafter(folder, parts)


@pytest.mark.parametrize("options", [{}, {"fc_norm": True}, {"norm_output": True}])
def test_settings_of_eagle_3_1_are_kept(parts: TargetParts, tmp_path: Path, options: dict) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8), **options)
    save_drafter(drafter, tmp_path / "drafter")
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert {name: config[name] for name in ("fc_norm", "norm_output") if name in config} == options
    assert load_drafter(tmp_path / "drafter", parts).options == drafter.options
    with pytest.raises(CheckpointError, match="option fc_norm is .* there, .* is asked for"):
        load_drafter(tmp_path / "drafter", parts, options={"fc_norm": not options.get("fc_norm", False)})


# ---- EAGLE ----------------------------------------------------------------------------------------------------------


def save_eagle(parts: TargetParts, folder: Path, format: str, vocab: Tensor) -> EagleDrafter:
    drafter = perturbed(EagleDrafter.from_target(parts, draft_vocab=vocab))
    save_drafter(drafter, folder, format)
    return drafter


@pytest.mark.parametrize("vocab", [torch.tensor([2, 7, 11, 30]), VOCAB, torch.arange(32)])
@pytest.mark.parametrize("format", ["sglang", "hf"])
def test_an_eagle_that_is_read_scores_as_what_was_written(
    parts: TargetParts, tmp_path: Path, format: str, vocab: Tensor
) -> None:
    drafter = save_eagle(parts, tmp_path / "drafter", format, vocab)
    read = load_drafter(tmp_path / "drafter", parts, format=format)
    assert isinstance(read, EagleDrafter) and read.published().keys() == drafter.published().keys()
    assert all(torch.equal(read.published()[name], tensor) for name, tensor in drafter.published().items())
    assert torch.equal(read.head, parts.head.weight[vocab]) and read.feature_layers == (3,)
    batch = pack([tiny_trajectory(drafter)])
    assert torch.equal(read.score(batch), drafter.score(batch))


@pytest.mark.parametrize("format", ["sglang", "hf"])
def test_an_eagle_folder_holds_what_others_read(parts: TargetParts, tmp_path: Path, format: str) -> None:
    drafter = save_eagle(parts, tmp_path / "whole", format, torch.arange(32))
    save_eagle(parts, tmp_path / "part", format, torch.tensor([2, 7, 11, 30]))
    # What the authors' and SGLang's own conversions of their drafters hold, less the rotary table.
    names = {
        "fc.weight", "fc.bias", "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight",
        "layers.0.self_attn.v_proj.weight", "layers.0.self_attn.o_proj.weight", "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight", "layers.0.post_attention_layernorm.weight",
        *({"embed_tokens.weight"} if format == "hf" else ()),
    }  # fmt: skip
    whole, part = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert set(whole) == names and set(part) == {*names, "d2t"}
    assert part["d2t"].tolist() == [2, 6, 9, 27]
    assert format == "sglang" or torch.equal(whole["embed_tokens.weight"], drafter.embedding)
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    expected = {
        "architectures": [{"sglang": "LlamaForCausalLMEagle", "hf": "LlamaForCausalLM"}[format]],
        "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 2,
        "head_dim": 4, "dtype": "float32", "tie_word_embeddings": False, "bias": True,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert "draft_vocab_size" not in config  # SGLang and this library would take it for EAGLE-3's


def test_an_eagle_as_its_authors_publish_it_is_read(parts: TargetParts, tmp_path: Path) -> None:
    """Theirs for Llama 3 has no bias, names its entries as transformers did then, and holds the embedding."""
    drafter = perturbed(EagleDrafter.from_target(parts, draft_vocab=torch.arange(32)))
    tensors = {name: t.half() for name, t in drafter.published().items() if name not in ("fc.bias", "d2t")}
    config = {
        "architectures": ["LlamaForCausalLM"], "bias": False, "hidden_act": "silu", "hidden_size": 16, "head_dim": 4,
        "intermediate_size": 32, "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32,
    }  # fmt: skip
    save_file(
        {**tensors, "embed_tokens.weight": torch.zeros(32, 16), "lm_head.weight": torch.zeros(32, 16)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = load_drafter(tmp_path, parts, format="hf")
    assert isinstance(read, EagleDrafter) and not read.fc.bias.any()
    assert torch.equal(read.embedding, parts.embedding) and torch.equal(read.head, parts.head.weight)
    assert read.fc.weight.dtype == torch.float32 and torch.equal(read.fc.weight, tensors["fc.weight"].float())
    (tmp_path / "config.json").write_text(json.dumps({**config, "bias": True}))
    with pytest.raises(CheckpointError, match="'fc.bias'.* is missing"):
        load_drafter(tmp_path, parts, format="hf")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["LlamaForCausalLMEagle"]}, EagleDrafter),
        ({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}, EagleDrafter),
        ({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "draft_vocab_size": 8}, Eagle3Drafter),
        ({"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1}, Eagle3Drafter),
    ],
)
def test_eagle_and_eagle3_are_told_apart(config: dict[str, Any], kind: type) -> None:
    assert recognized(config) is kind


def test_a_whole_llama_is_no_eagle() -> None:
    assert recognized({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 30}) is not EagleDrafter


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": 32}, "config.json: hidden_size is 32, the target has 16"),
        ({"vocab_size": 33}, "config.json: vocab_size is 33, the target has 32"),
        ({"attention_bias": True}, "attention_bias is set, which this drafter does not support; give one without it"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, this drafter has one layer"),
        ({"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}}, "'rope_theta': 77.0.*the target has"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, the target has 2"),
    ],
)
def test_another_targets_eagle_is_refused_by_name(
    parts: TargetParts, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    save_eagle(parts, tmp_path / "drafter", "sglang", VOCAB)
    path = tmp_path / "drafter" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(CheckpointError, match=message):
        load_drafter(tmp_path / "drafter", parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": None}, "'fc.weight'.* is missing"),
        ({"fc.bias": None}, "'fc.bias'.* is missing"),
        ({"layers.0.mlp.up_proj.weight": None}, "'layers.0.mlp.up_proj.weight'.* is missing"),
        ({"layers.0.input_layernorm.weight": torch.ones(16)}, "'layers.0.input_layernorm.weight' is unknown"),
        ({"norm.weight": torch.ones(16)}, "'norm.weight' is unknown"),
        ({"d2t": torch.full((16,), 30)}, "'d2t' points outside the target's vocabulary of 32"),
        ({"d2t": -torch.arange(16)}, "'d2t' gives token 0 more than one row"),
    ],
)
def test_a_tensor_that_does_not_belong_to_an_eagle_is_named(
    parts: TargetParts, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    save_eagle(parts, tmp_path / "drafter", "sglang", VOCAB)
    path = tmp_path / "drafter" / "model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=message):
        load_drafter(tmp_path / "drafter", parts)
