"""Folders of causal LMs: a standalone drafter is a plain model on disk, and models that cannot draft are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from causal_lms import SIZES, VOCAB, assert_drafts_as, plain, proposed, save_model, standalone_of_the_target
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from aurora_rl.policies import StandaloneDrafter, TargetParts, TreeShape
from aurora_rl.policies.formats.files import load_drafter, save_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_trajectory
from aurora_rl.trajectories import pack


@pytest.fixture
def saved(parts: TargetParts, tmp_path: Path) -> Path:
    save_drafter(standalone_of_the_target().float(), tmp_path / "drafter")
    return tmp_path / "drafter"


def test_a_folder_is_a_plain_causal_lm(saved: Path, parts: TargetParts) -> None:
    config = json.loads((saved / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "num_hidden_layers": 2,
        "tie_word_embeddings": False, "dtype": "float32", "aurora_rl_draft_vocab": VOCAB.tolist(),
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert "draft_vocab_size" not in config  # an EAGLE-3 drafter would claim it
    tensors = load_file(saved / "model.safetensors")
    assert set(tensors) == set(AutoModelForCausalLM.from_pretrained(saved).state_dict())
    outside = torch.ones(32, dtype=torch.bool).index_fill(0, VOCAB, False)
    assert torch.equal(tensors["lm_head.weight"][outside], parts.head.weight[outside])
    assert torch.equal(tensors["lm_head.weight"][VOCAB], standalone_of_the_target().lm_head.weight.float())


def test_what_is_read_drafts_as_what_was_written(saved: Path, parts: TargetParts) -> None:
    drafter, read = standalone_of_the_target().float(), load_drafter(saved, parts)
    assert isinstance(read, StandaloneDrafter) and dict(read.options) == {"num_layers": 2}
    assert read.draft_vocab.tolist() == VOCAB.tolist()
    assert read.published().keys() == drafter.published().keys()
    assert all(torch.equal(read.published()[name], tensor) for name, tensor in drafter.published().items())
    batch = pack([tiny_trajectory(drafter)])
    assert torch.equal(read.score(batch), drafter.score(batch))
    with pytest.raises(CheckpointError, match="option num_layers is 2 there, 3 is asked for"):
        load_drafter(saved, parts, options={"num_layers": 3})


def test_a_users_folder_with_a_tied_head_has_every_token(tmp_path: Path, parts: TargetParts) -> None:
    model = save_model(tmp_path / "model", Qwen2Config(**SIZES, tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    drafter = StandaloneDrafter.from_target(parts, draft_vocab=torch.arange(32), model=model)
    read = load_drafter(model, parts, format="sglang", options={"model": model})
    assert all(torch.equal(read.published()[name], tensor) for name, tensor in drafter.published().items())
    save_drafter(read, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "aurora_rl_draft_vocab" not in config and not config["tie_word_embeddings"]
    assert_drafts_as(plain(model), torch.arange(32), proposed(read.double(), TreeShape(2)))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"vocab_size": 33}, "config.json: vocab_size is 33, the target has 32"),
        ({"aurora_rl_draft_vocab": [3, 32]}, "aurora_rl_draft_vocab points outside the target's vocabulary of 32"),
        ({"aurora_rl_draft_vocab": [3, 3]}, "aurora_rl_draft_vocab gives token 3 more than one row"),
        ({"aurora_rl_draft_vocab": [3, 1]}, "aurora_rl_draft_vocab is not rising: row 0 is token 3, row 1 token 1"),
        ({"model_type": "klingon"}, "klingon"),
        ({"model_type": "mistral", "sliding_window": 16}, "slides its attention over 16 tokens, .* a context of 512"),
        ({"num_key_value_heads": 4}, r"k_proj.weight' has shape \(8, 16\), this drafter needs \(16, 16\)"),
        ({"num_hidden_layers": 3}, "tensor 'model.layers.2.self_attn.q_proj.weight'.* is missing"),
        ({"num_hidden_layers": 1}, "tensor 'model.layers.1.*' is unknown"),
    ],
)
def test_folders_that_do_not_fit_are_refused_by_name(
    saved: Path, parts: TargetParts, entries: dict, message: str
) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **entries}))
    with pytest.raises(CheckpointError, match=message):
        load_drafter(saved, parts, StandaloneDrafter)  # a Llama of one layer would be taken for an EAGLE


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(saved: Path, parts: TargetParts, name: str) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors[name]
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor '{name}'.* is missing"):
        load_drafter(saved, parts)


def test_a_folder_that_does_not_say_its_architecture_is_refused(saved: Path, parts: TargetParts) -> None:
    config = json.loads((saved / "config.json").read_text())
    del config["model_type"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="model_type is missing"):
        load_drafter(saved, parts)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GemmaConfig(**SIZES | {"vocab_size": 40}), "vocabulary of 40 tokens, the target one of 32"),
        (MistralConfig(**SIZES, sliding_window=16), "slides its attention over 16 tokens, .* a context of 512"),
        (CohereConfig(**SIZES, logit_scale=0.5), "CohereForCausalLM computes something else"),
        (Gemma2Config(**SIZES, sliding_window=512, final_logit_softcapping=2.0), "Gemma2ForCausalLM computes"),
        (MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4), "MambaForCausalLM has no"),
    ],
)
def test_models_that_cannot_draft_are_refused(
    tmp_path: Path, parts: TargetParts, config: PretrainedConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StandaloneDrafter.from_target(parts, draft_vocab=VOCAB, model=save_model(tmp_path / "model", config))


def test_a_model_that_is_not_there_or_not_whole_is_named(tmp_path: Path, parts: TargetParts) -> None:
    with pytest.raises(ValueError, match="nowhere' cannot be loaded"):
        StandaloneDrafter.from_target(parts, draft_vocab=VOCAB, model=str(tmp_path / "nowhere"))
    model = save_model(tmp_path / "model", Qwen2Config(**SIZES))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no weights 'model.norm.weight'"):
        StandaloneDrafter.from_target(parts, draft_vocab=VOCAB, model=model)
