"""Pieces of the target and the day-0 draft vocabulary."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from aurora_rl.policies import TargetParts, choose_draft_vocab
from aurora_rl.policies.target import default_feature_layers, token_prior
from aurora_rl.testing import tiny_target


def test_parts_of_a_target() -> None:
    target = tiny_target()
    parts = TargetParts.of(target)
    assert torch.equal(parts.embedding, target.model.embed_tokens.weight)
    assert torch.equal(parts.head.weight, target.lm_head.weight)
    assert parts.norm is not None and torch.equal(parts.norm, target.model.norm.weight)
    assert torch.equal(parts.last_layer["mlp.up_proj.weight"], target.model.layers[2].mlp.up_proj.weight)
    assert parts.config.hidden_size == 16


def test_tied_weights_are_one_tensor() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    parts = TargetParts.of(LlamaForCausalLM(config))
    assert parts.head.weight.data_ptr() == parts.embedding.data_ptr()


def test_a_head_with_a_bias_is_refused() -> None:
    config = PhiConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="PhiForCausalLM has an output head with a bias"):
        TargetParts.of(PhiForCausalLM(config))


def test_digest_tells_architectures_apart() -> None:
    digests = [TargetParts.of(tiny_target(a, num_layers=n)).digest for a in ("llama", "qwen3") for n in (2, 3)]
    assert len(set(digests)) == 4
    assert digests[0] == TargetParts.of(tiny_target("llama", num_layers=2, seed=1)).digest


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, (0,)), (2, (0, 1)), (3, (0, 1)), (4, (1, 2)), (8, (2, 4, 5)), (30, (2, 15, 27)), (32, (2, 16, 29))],
)
def test_default_feature_layers(layers: int, expected: tuple[int, ...]) -> None:
    assert default_feature_layers(layers) == expected


def test_draft_vocab_takes_the_highest_prior_then_the_lowest_ids() -> None:
    assert choose_draft_vocab(3, torch.tensor([0.0, 0.0, 5.0, 0.0, 7.0])).tolist() == [0, 2, 4]
    assert choose_draft_vocab(2, torch.zeros(5)).tolist() == [0, 1]


@pytest.mark.parametrize("size", [0, 6])
def test_draft_vocab_lies_in_the_targets(size: int) -> None:
    with pytest.raises(ValueError, match=f"1..5 .the target's vocabulary., got {size}"):
        choose_draft_vocab(size, torch.zeros(5))


def test_token_prior_counts_prompts_and_what_the_target_expects() -> None:
    target = tiny_target(dtype=torch.float32)
    prompts = [[3, 3, 5], [7]]
    prior = token_prior(target, prompts)
    expected = torch.zeros(32)
    expected[3] += 2
    expected[5] += 1
    expected[7] += 1
    for prompt in prompts:
        expected += target(torch.tensor([prompt])).logits[0].softmax(-1).sum(0)
    torch.testing.assert_close(prior, expected)
    assert prior.sum().item() == pytest.approx(8.0, abs=1e-4)
