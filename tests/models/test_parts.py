"""Pieces of the target and the day-0 draft vocabulary."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_family
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from aurora_rl.models.parts import (
    check_rope,
    default_feature_layers,
    layer_config,
    settle_attention,
    token_prior,
)
from aurora_rl.models.target_head import TargetHead
from aurora_rl.policies import Eagle3Drafter, TargetParts, available_drafters, choose_draft_vocab, get_drafter
from aurora_rl.testing import tiny_target
from aurora_rl.testing.families import tiny_family as any_family
from aurora_rl.testing.tiny import cast


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


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16])
def test_the_fingerprint_is_that_of_the_file_in_whichever_dtype_it_is_loaded(kept: torch.dtype) -> None:
    def loaded(dtype: torch.dtype) -> str:
        target = tiny_target(dtype=torch.float32)
        with torch.no_grad():
            target.lm_head.weight.mul_(1e-4)  # weights of which float16 keeps fewer digits than bfloat16
        return TargetParts.of(cast(cast(target, kept), dtype)).fingerprint

    assert {loaded(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)} == {loaded(kept)}


def test_a_norm_without_a_weight_multiplies_by_one() -> None:
    model = any_family("nanochat")
    parts = TargetParts.of(model)
    for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
        torch.testing.assert_close(parts.last_layer[name], torch.ones(8))
    vocab = torch.arange(48)
    for name in available_drafters():
        assert get_drafter(name).from_target(parts, draft_vocab=vocab).draft_vocab.tolist() == vocab.tolist()


def test_a_norm_is_what_it_multiplies_by() -> None:
    gemma, neox = tiny_family("gemma3_text"), tiny_family("gpt_neox")
    parts, last = TargetParts.of(gemma), gemma.model.layers[-1]
    torch.testing.assert_close(parts.norm, 1 + gemma.model.norm.weight)
    torch.testing.assert_close(parts.last_layer["input_layernorm.weight"], 1 + last.input_layernorm.weight)
    torch.testing.assert_close(parts.last_layer["self_attn.q_norm.weight"], 1 + last.self_attn.q_norm.weight)
    # What Llama calls so stands before the MLP.
    before_mlp = last.pre_feedforward_layernorm.weight
    torch.testing.assert_close(parts.last_layer["post_attention_layernorm.weight"], 1 + before_mlp)
    torch.testing.assert_close(TargetParts.of(neox).norm, neox.gpt_neox.final_layer_norm.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_are_found_in_the_dtype_of_the_target(dtype: torch.dtype) -> None:
    for name in ("llama", "gemma2", "gpt2"):
        exact, parts = (TargetParts.of(tiny_family(name, dtype=kind)) for kind in (torch.float32, dtype))
        assert exact.norm is not None and parts.norm is not None
        # Two roundings of a number about 1: of the weight, and of what it multiplies.
        torch.testing.assert_close(parts.norm.float(), exact.norm, rtol=0, atol=2 * torch.finfo(dtype).eps)
        assert exact.last_layer.keys() == parts.last_layer.keys()


def test_what_normalised_outputs_add_is_not_taken_for_a_llamas() -> None:
    kept = {name: set(TargetParts.of(tiny_family(name)).last_layer) for name in ("gemma", "gemma2", "olmo2", "mixtral")}
    outputs = {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    assert outputs <= kept["gemma"] and not outputs & (kept["gemma2"] | kept["olmo2"])
    assert {name for name in kept["mixtral"] if name.startswith("mlp")} == set()


def test_a_part_that_cannot_be_copied_whole_adds_nothing() -> None:
    for name, attention, mlp in (("llama", True, True), ("mixtral", True, False), ("gpt2", False, False)):
        drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_family(name)), draft_vocab=torch.arange(48))
        assert bool(drafter.midlayer.self_attn.o_proj.weight.any()) == attention
        assert bool(drafter.midlayer.mlp.down_proj.weight.any()) == mlp


def test_the_fingerprint_covers_the_whole_head() -> None:
    parts = TargetParts.of(tiny_target())
    weight = parts.head.weight
    others = [TargetHead(weight, torch.ones(32)), TargetHead(weight, scale=2), TargetHead(weight, softcap=2)]
    heads = [TargetHead(weight), *others]
    assert len({replace(parts, head=head).fingerprint for head in heads}) == 4
    assert replace(parts, head=heads[0]).fingerprint == parts.fingerprint


def test_an_embedding_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="OPTForCausalLM has an embedding of width 16 and layers of width 32"):
        TargetParts.of(tiny_family("opt", word_embed_proj_dim=16))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("falcon", {}, {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, {"num_key_value_heads": 2}),
        ("bloom", {"layer_norm_epsilon": 1e-3}, {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
        ("gpt2", {"intermediate_size": None}, {"intermediate_size": 128, "max_position_embeddings": 128}),
        ("mpt", {}, {"max_position_embeddings": 128}),
        ("deepseek_v3", {}, {"head_dim": 8, "num_key_value_heads": 4}),
        ("gpt2", {"hidden_size": 30}, {"num_attention_heads": 3, "head_dim": 10}),
        ("starcoder2", {"norm_epsilon": 1e-4}, {"rms_norm_eps": 1e-4}),
    ],
)
def test_a_layer_of_any_targets_sizes(name: str, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = {**FAMILIES[name], "num_attention_heads": 4, "hidden_size": 32, **settings}
    config = AutoConfig.for_model(name, **{"max_position_embeddings": 128, **settings})
    found = layer_config(replace(TargetParts.of(tiny_target()), config=config))
    assert {key: getattr(found, key) for key in expected} == expected


LONG = {"rope_type": "longrope", "rope_theta": 5e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_type": "default", "rope_theta": 1e4},
        ),
        (LONG, {"rope_type": "default", "rope_theta": 5e4}),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, {"rope_type": "default", "rope_theta": 1e4}),
        (
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        ),
        (
            {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
            {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        ),
        (None, {"rope_type": "default", "rope_theta": 1e4}),
    ],
)
def test_a_drafters_positions_do_not_depend_on_the_pass(rope: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    parts = TargetParts.of(tiny_target())
    config = copy.deepcopy(parts.config)
    config.rope_parameters = rope
    parts = replace(parts, config=config)
    found = layer_config(parts)
    assert found.rope_parameters == expected
    check_rope(found, parts)  # a drafter that is saved and read again


def test_a_checkpoint_whose_positions_depend_on_the_pass_is_refused() -> None:
    parts = TargetParts.of(tiny_target())
    config = layer_config(parts)
    config.rope_parameters = LONG
    with pytest.raises(ValueError, match="rope_type is 'longrope', which turns keys by the length of the pass"):
        settle_attention(config, {}, parts, "own")


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


@pytest.mark.parametrize("name", ["granite", "gemma2", "phi"])
def test_token_prior_is_of_the_served_distribution(name: str) -> None:
    model = tiny_family(name)
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
    model = tiny_family("gpt2", max_position_embeddings=32)
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
