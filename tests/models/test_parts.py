"""What drafters read of a target: embedding, head, norms, its last layer, and its fingerprint."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from causal_families import tiny_family
from families import FAMILIES, random_family
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from aurora_rl.models.parts import default_feature_layers, layer_config
from aurora_rl.models.target_head import TargetHead
from aurora_rl.policies import DRAFTERS, Eagle3Drafter, TargetParts, get_drafter
from aurora_rl.policies.formats.checks import check_rope
from aurora_rl.testing import tiny_target
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
    model = tiny_family("nanochat")
    parts = TargetParts.of(model)
    for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
        torch.testing.assert_close(parts.last_layer[name], torch.ones(8))
    vocab = torch.arange(48)
    for name in DRAFTERS:
        assert get_drafter(name).from_target(parts, draft_vocab=vocab).draft_vocab.tolist() == vocab.tolist()


def test_a_norm_is_what_it_multiplies_by() -> None:
    gemma, neox = random_family("gemma3_text"), random_family("gpt_neox")
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
        exact, parts = (TargetParts.of(random_family(name, dtype=kind)) for kind in (torch.float32, dtype))
        assert exact.norm is not None and parts.norm is not None
        # Two roundings of a number about 1: of the weight, and of what it multiplies.
        torch.testing.assert_close(parts.norm.float(), exact.norm, rtol=0, atol=2 * torch.finfo(dtype).eps)
        assert exact.last_layer.keys() == parts.last_layer.keys()


def test_outputs_that_are_normalised_are_not_taken_for_those_of_a_llama() -> None:
    kept = {
        name: set(TargetParts.of(random_family(name)).last_layer) for name in ("gemma", "gemma2", "olmo2", "mixtral")
    }
    outputs = {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    assert outputs <= kept["gemma"] and not outputs & (kept["gemma2"] | kept["olmo2"])
    assert {name for name in kept["mixtral"] if name.startswith("mlp")} == set()


def test_a_part_that_cannot_be_copied_whole_adds_nothing() -> None:
    for name, attention, mlp in (("llama", True, True), ("mixtral", True, False), ("gpt2", False, False)):
        drafter = Eagle3Drafter.from_target(TargetParts.of(random_family(name)), draft_vocab=torch.arange(48))
        assert bool(drafter.midlayer.self_attn.o_proj.weight.any()) == attention
        assert bool(drafter.midlayer.mlp.down_proj.weight.any()) == mlp


def test_the_fingerprint_covers_the_whole_head() -> None:
    parts = TargetParts.of(tiny_target())
    weight = parts.head.weight
    transformed = [TargetHead(weight, torch.ones(32)), TargetHead(weight, scale=2), TargetHead(weight, softcap=2)]
    heads = [TargetHead(weight), *transformed]
    assert len({replace(parts, head=head).fingerprint for head in heads}) == 4
    assert replace(parts, head=heads[0]).fingerprint == parts.fingerprint


def test_an_embedding_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="OPTForCausalLM has an embedding of width 16 and layers of width 32"):
        TargetParts.of(random_family("opt", word_embed_proj_dim=16))


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
