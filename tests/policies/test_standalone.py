"""A causal LM as drafter: it drafts what the plain model says, learns what it drafts, and is a plain model on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from aurora_rl.policies import Drafter, Proposal, StandaloneDrafter, TargetParts, TreeShape
from aurora_rl.policies.formats.files import load_drafter, save_drafter
from aurora_rl.testing import check_drafter, serve, tiny_target, tiny_trajectory
from aurora_rl.training.checkpoint import CheckpointError
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex

VOCAB = torch.tensor([0, 1, 3, 7, 8, 12, 19, 25, 30, 31])
SIZES = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 512, "initializer_range": 0.4,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def save_model(folder: Path, config: PretrainedConfig) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def plain(folder: Path | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)


def made_of_the_target(architecture: str = "llama", **options) -> StandaloneDrafter:
    """In float64, and trained a little: what adds nothing at day 0 adds something."""
    torch.manual_seed(0)
    parts = TargetParts.of(tiny_target(architecture))
    drafter = StandaloneDrafter.from_target(parts, draft_vocab=VOCAB, **options).double()
    weights = drafter.published()
    drafter.install({name: t + 0.2 * torch.randn_like(t) if name != "d2t" else t for name, t in weights.items()})
    return drafter


# ---- serving and training -------------------------------------------------------------------------------------------


def test_one_made_of_the_target_conforms() -> None:
    check_drafter(made_of_the_target("llama"), tiny_target("llama"))


def test_a_model_of_another_architecture_and_width_conforms(tmp_path: Path) -> None:
    target, model = tiny_target("qwen3"), save_model(tmp_path / "model", GemmaConfig(**SIZES))
    drafter = StandaloneDrafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(32), model=model)
    check_drafter(drafter.double(), target)


TEXTS = [torch.arange(9) % 32, torch.tensor([4, 4]), torch.tensor([31, 0, 17, 5, 5])]


def proposed(drafter: Drafter, shape: TreeShape) -> Proposal:
    """Trees behind texts of unequal length, the slots filled in two turns."""
    drafter.allocate(len(TEXTS), 10)
    for slot, text in enumerate(TEXTS):
        half = len(text) // 2
        for part in (text[: half + 1], text[half:]):
            if len(part) > 1:
                num_new = torch.tensor([len(part) - 1])
                drafter.extend(torch.tensor([slot]), part[None], torch.zeros(1, len(part) - 1, 0), num_new)
    return drafter.propose(torch.arange(len(TEXTS)), shape)


def assert_drafts_as(model: PreTrainedModel, vocab: Tensor, proposal: Proposal) -> None:
    """Every node's log-probability is the plain model's, run anew over the whole text and the node's path."""
    for row, text in enumerate(TEXTS):
        paths: list[list[int]] = []
        for token, parent, log_prob in zip(*(part[row].tolist() for part in proposal[:3]), strict=True):
            above = paths[parent] if parent >= 0 else text.tolist()
            logits = model(torch.tensor([above])).logits[0, -1, vocab].log_softmax(-1)
            assert log_prob == pytest.approx(float(logits[(vocab == token).nonzero()]), abs=1e-5)
            paths.append([*above, token])


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_trees_have_the_plain_models_probabilities(tmp_path: Path, architecture: str) -> None:
    drafter = made_of_the_target(architecture, num_layers=3)
    save_drafter(drafter, tmp_path / "saved")
    proposal = proposed(drafter, TreeShape(4, 3, 20))
    assert proposal.tokens.shape == (3, 20)
    assert_drafts_as(plain(tmp_path / "saved"), VOCAB, proposal)


@pytest.mark.parametrize("config", [GemmaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=None)])
def test_a_given_model_drafts_as_it_speaks(tmp_path: Path, config: PretrainedConfig) -> None:
    model = save_model(tmp_path / "model", config)
    parts = TargetParts.of(tiny_target())
    drafter = StandaloneDrafter.from_target(parts, draft_vocab=VOCAB, model=model).double()
    assert_drafts_as(plain(model), VOCAB, proposed(drafter, TreeShape(3, 2)))


def test_a_tree_of_more_nodes_than_there_is_room_leaves_other_slots_alone() -> None:
    drafter, shape = made_of_the_target(), TreeShape(9, 10, 60)
    first = proposed(drafter, shape)
    again = drafter.propose(torch.arange(len(TEXTS)), shape)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))


def test_the_target_as_its_own_drafter_is_always_right(tmp_path: Path) -> None:
    target = tiny_target(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")
    drafter = StandaloneDrafter.from_target(
        TargetParts.of(target), draft_vocab=torch.arange(32), model=str(tmp_path / "target")
    )
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([1, 30, 2, 2, 9])]
    batch = pack(serve(drafter.double(), tiny_target(), prompts, shape=TreeShape(3), max_new_tokens=12, num_slots=2))
    assert bool(batch["nodes", "accepted"].all())
    # A prompt's first round and every later one commit the chain and one more token.
    assert len(batch["rounds", "anchor"]) == 2 * 12 // 4


@pytest.mark.parametrize("steps", [1, 4])
def test_unroll_is_that_of_chains_of_the_true_tokens(steps: int) -> None:
    drafter = made_of_the_target()
    batch = pack([tiny_trajectory(drafter, prompt_length=n, request=n) for n in (1, 5)])
    got, expected = drafter.unroll(batch, steps), Drafter.unroll(drafter, batch, steps)
    assert torch.equal(got.valid, expected.valid) and len(got.logits) == steps
    for logits, others, valid in zip(got.logits, expected.logits, got.valid, strict=True):
        torch.testing.assert_close(logits[valid], others[valid], rtol=0, atol=1e-10)
    assert got.states is not None
    torch.testing.assert_close(drafter.lm_head(got.states[0]), got.logits[0])


def test_states_of_another_width_than_the_targets_are_not_given(tmp_path: Path) -> None:
    model, parts = save_model(tmp_path / "model", Qwen2Config(**SIZES)), TargetParts.of(tiny_target())
    drafter = StandaloneDrafter.from_target(parts, draft_vocab=VOCAB, model=model).double()
    assert drafter.unroll(pack([tiny_trajectory(drafter)]), 1).states is None


def test_wanting_nothing_gives_nothing() -> None:
    drafter = made_of_the_target()
    batch = pack([tiny_trajectory(drafter)])
    none = torch.zeros(len(batch["rounds", "anchor"]) + len(batch["nodes", "tokens"]), dtype=torch.bool)
    assert drafter.context_logits(batch, TreeIndex.of(batch), none).shape == (0, len(VOCAB))


# ---- day 0 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 3])
def test_day_0_is_the_targets_last_layer_on_its_embedding(num_layers: int) -> None:
    target = tiny_target()
    drafter = StandaloneDrafter.from_target(TargetParts.of(target), draft_vocab=VOCAB, num_layers=num_layers).double()
    assert dict(drafter.options) == {"num_layers": num_layers} and drafter.feature_layers == ()
    proposal = proposed(drafter, TreeShape(2, 2))
    target.model.layers = target.model.layers[-1:]
    target.config.num_hidden_layers, target.model.layers[0].self_attn.layer_idx = 1, 0
    assert_drafts_as(target, VOCAB, proposal)


def test_the_embedding_neither_learns_nor_travels() -> None:
    drafter, parts = made_of_the_target(), TargetParts.of(tiny_target())
    assert torch.equal(drafter.model.embed_tokens.weight, parts.embedding.float().double())
    assert not any("embed" in name for name in {**dict(drafter.named_parameters()), **drafter.published()})


def test_rotary_frequencies_are_not_rounded_with_the_weights() -> None:
    drafter = made_of_the_target()
    exact = drafter.model.rotary_emb.inv_freq.clone()
    assert exact.dtype == torch.float32
    drafter.bfloat16()
    assert drafter.lm_head.weight.dtype == drafter.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(drafter.model.rotary_emb.inv_freq, exact)
    assert not torch.equal(exact.bfloat16().float(), exact)  # what would have been lost


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def parts() -> TargetParts:
    return TargetParts.of(tiny_target(dtype=torch.float32))


@pytest.fixture
def saved(parts: TargetParts, tmp_path: Path) -> Path:
    save_drafter(made_of_the_target().float(), tmp_path / "drafter")
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
    assert torch.equal(tensors["lm_head.weight"][VOCAB], made_of_the_target().lm_head.weight.float())


def test_what_is_read_drafts_as_what_was_written(saved: Path, parts: TargetParts) -> None:
    drafter, read = made_of_the_target().float(), load_drafter(saved, parts)
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
    made = StandaloneDrafter.from_target(parts, draft_vocab=torch.arange(32), model=model)
    read = load_drafter(model, parts, layout="sglang", options={"model": model})
    assert all(torch.equal(read.published()[name], tensor) for name, tensor in made.published().items())
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


# ---- models that cannot draft ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("options", "message"),
    [({"feature_layers": (1,)}, "reads no features"), ({"num_layers": 0}, "num_layers must be at least 1, got 0")],
)
def test_options_out_of_range_are_refused(parts: TargetParts, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StandaloneDrafter.from_target(parts, draft_vocab=VOCAB, **options)
