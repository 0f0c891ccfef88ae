"""A causal LM as drafter: it drafts what the plain model says, and learns what it drafts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from causal_lms import SIZES, TEXTS, VOCAB, assert_drafts_as, plain, proposed, save_model, standalone_of_the_target
from transformers import (
    GemmaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from aurora_rl.policies import Drafter, StandaloneDrafter, TargetParts, TreeShape
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.testing import check_drafter, serve, tiny_target, tiny_trajectory
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex

# ---- serving and training -------------------------------------------------------------------------------------------


def test_a_model_of_another_architecture_and_width_passes_the_checks(tmp_path: Path) -> None:
    target, model = tiny_target("qwen3"), save_model(tmp_path / "model", GemmaConfig(**SIZES))
    drafter = StandaloneDrafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(32), model=model)
    check_drafter(drafter.double(), target)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_trees_have_the_plain_models_probabilities(tmp_path: Path, architecture: str) -> None:
    drafter = standalone_of_the_target(architecture, num_layers=3)
    save_drafter(drafter, tmp_path / "saved")
    proposal = proposed(drafter, TreeShape(4, 3, 20))
    assert proposal.tokens.shape == (3, 20)
    assert_drafts_as(plain(tmp_path / "saved"), VOCAB, proposal)


@pytest.mark.parametrize("config", [GemmaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=None)])
def test_a_model_of_the_user_drafts_what_it_would_say(tmp_path: Path, config: PretrainedConfig) -> None:
    model = save_model(tmp_path / "model", config)
    parts = TargetParts.of(tiny_target())
    drafter = StandaloneDrafter.from_target(parts, draft_vocab=VOCAB, model=model).double()
    assert_drafts_as(plain(model), VOCAB, proposed(drafter, TreeShape(3, 2)))


def test_a_tree_of_more_nodes_than_there_is_room_leaves_other_slots_alone() -> None:
    drafter, shape = standalone_of_the_target(), TreeShape(9, 10, 60)
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
    drafter = standalone_of_the_target()
    batch = pack([tiny_trajectory(drafter, prompt_length=n, request=n) for n in (1, 5)])
    got, expected = drafter.unroll(batch, steps), Drafter.unroll(drafter, batch, steps)
    assert torch.equal(got.valid, expected.valid) and len(got.logits) == steps
    for logits, expected_logits, valid in zip(got.logits, expected.logits, got.valid, strict=True):
        torch.testing.assert_close(logits[valid], expected_logits[valid], rtol=0, atol=1e-10)
    assert got.states is not None
    torch.testing.assert_close(drafter.lm_head(got.states[0]), got.logits[0])


def test_states_of_another_width_than_the_targets_are_not_returned(tmp_path: Path) -> None:
    model, parts = save_model(tmp_path / "model", Qwen2Config(**SIZES)), TargetParts.of(tiny_target())
    drafter = StandaloneDrafter.from_target(parts, draft_vocab=VOCAB, model=model).double()
    assert drafter.unroll(pack([tiny_trajectory(drafter)]), 1).states is None


def test_wanting_nothing_gives_nothing() -> None:
    drafter = standalone_of_the_target()
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
    drafter, parts = standalone_of_the_target(), TargetParts.of(tiny_target())
    assert torch.equal(drafter.model.embed_tokens.weight, parts.embedding.float().double())
    assert not any("embed" in name for name in {**dict(drafter.named_parameters()), **drafter.published()})


def test_rotary_frequencies_are_not_rounded_with_the_weights() -> None:
    drafter = standalone_of_the_target()
    exact = drafter.model.rotary_emb.inv_freq.clone()
    assert exact.dtype == torch.float32
    drafter.bfloat16()
    assert drafter.lm_head.weight.dtype == drafter.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(drafter.model.rotary_emb.inv_freq, exact)
    assert not torch.equal(exact.bfloat16().float(), exact)  # what would have been lost


@pytest.mark.parametrize(
    ("options", "message"),
    [({"feature_layers": (1,)}, "reads no features"), ({"num_layers": 0}, "num_layers must be at least 1, got 0")],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    parts = TargetParts.of(tiny_target())
    with pytest.raises(ValueError, match=message):
        StandaloneDrafter.from_target(parts, draft_vocab=VOCAB, **options)
