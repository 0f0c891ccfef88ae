"""The day-0 draft vocabulary, and the prior that chooses it: literal numbers and the target's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import random_family
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from aurora_rl.models.draft_vocab import choose_draft_vocab, token_prior
from aurora_rl.testing import tiny_target


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


@pytest.mark.parametrize("name", ["granite", "gemma2", "phi"])
def test_token_prior_is_of_the_served_distribution(name: str) -> None:
    model = random_family(name)
    prompt = [3, 7, 9, 20]
    expected = model(torch.tensor([prompt])).logits[0].softmax(-1).sum(0)
    expected[prompt] += 1
    torch.testing.assert_close(token_prior(model, [prompt]), expected)


LONG_READERS = {
    "llama": {},
    "bloom": {},
    "gpt2": {},
    "mistral": {"sliding_window": 40},
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # its convolutions lose their state between two chunks
}


@pytest.mark.parametrize("name", LONG_READERS)
def test_token_prior_of_a_long_prompt_is_that_of_one_pass(name: str) -> None:
    config = AutoConfig.for_model(
        name, vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3, pad_token_id=0,
        **LONG_READERS[name],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    prompt = torch.randint(48, (1100,))
    expected = model(prompt[None]).logits[0].softmax(-1).sum(0) + torch.bincount(prompt, minlength=48)
    with _Largest() as largest:
        prior = token_prior(model, [prompt.tolist()])
    torch.testing.assert_close(prior, expected, atol=1e-3, rtol=1e-4)
    if name != "lfm2":  # scores of 4 heads in float32; those of all pairs of tokens take 19 MB
        assert largest.bytes <= 4 * 4 * 512 * 1100


def test_token_prior_of_a_prompt_beyond_the_context_is_that_of_its_last_tokens() -> None:
    model = random_family("gpt2", max_position_embeddings=32)
    prompt = [i % 48 for i in range(42)]
    assert torch.equal(token_prior(model, [prompt]), token_prior(model, [prompt[-32:]]))


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation returns, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.bytes = max([self.bytes, *(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_token_prior_takes_the_same_memory_for_long_prompts() -> None:
    config = LlamaConfig(
        vocab_size=151936, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=2, max_position_embeddings=16384, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with _Largest() as largest:
        prior = token_prior(model, [list(range(512))])
    assert prior.sum().item() == pytest.approx(1024, rel=1e-3)
    assert largest.bytes < 20e6  # the logits of all tokens are 311 MB
