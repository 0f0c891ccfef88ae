"""What layers see of a text: windows, chunks and RoPE whose lengths are served as they are, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from served_models import ALTERNATING, FAMILIES, HEADS, LLAMA4, LONGROPE, SIZES, engine_of, generated, model_of, served
from transformers import PretrainedConfig

from aurora_rl.envs.attention_span import mask_kinds
from aurora_rl.envs.exactness import UnsupportedModelError


def whole(query: int, key: int) -> bool:
    return True


def window(query: int, key: int) -> bool:
    return query - key < 3


def chunk(query: int, key: int) -> bool:
    return query // 4 == key // 4


KINDS = {
    "whole text": (lambda: hf.LlamaConfig(**HEADS), {}),
    "window of all layers": (lambda: hf.MistralConfig(**HEADS, sliding_window=3), {None: window}),
    "window beyond the slot": (lambda: hf.MistralConfig(**HEADS, sliding_window=10), {}),
    "window of some layers": (
        lambda: hf.Gemma3TextConfig(**HEADS, sliding_window=3, layer_types=ALTERNATING),
        {"sliding_attention": window, "full_attention": whole},
    ),
    "chunks of some layers": (
        lambda: hf.Llama4TextConfig(**HEADS, **LLAMA4, attention_chunk_size=4),
        {"chunked_attention": chunk, "full_attention": whole},
    ),
    "chunks beyond the slot": (lambda: hf.Llama4TextConfig(**HEADS, **LLAMA4, attention_chunk_size=10), {}),
}


@pytest.mark.parametrize("case", KINDS)
def test_each_kind_of_layer_sees_what_its_window_or_chunk_holds(case: str) -> None:
    config, expected = KINDS[case]
    kinds = mask_kinds(config(), "model", max_length=10)
    assert kinds.keys() == expected.keys()
    position = torch.arange(10)
    for kind, first in kinds.items():
        start = torch.zeros(10) if first is None else first(position)
        seen = position >= start[:, None]
        for query in range(10):
            for key in range(query + 1):
                assert bool(seen[query, key]) == expected[kind](query, key), (kind, query, key)


def test_dynamic_rope_serves_a_request_after_another_that_filled_the_context() -> None:
    config = hf.LlamaConfig(
        **{**HEADS, "max_position_embeddings": 32},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    )
    model = model_of(config)
    prompts = [torch.tensor([5, 9, 11, 7, 21]), torch.tensor([8, 30, 2, 17])]
    texts = [generated(model, prompts[0], 27), generated(model, prompts[1], 20)]
    engine = engine_of(model, max_length=32)
    for drafted in (False, True):
        assert served(engine, prompts, texts, drafted=drafted)[0] == texts


@pytest.mark.parametrize("kind", [{"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, LONGROPE])
def test_a_longer_pass_before_the_engine_was_built_leaves_no_trace(kind: dict[str, Any]) -> None:
    sizes = {**SIZES, "max_position_embeddings": 128 if kind is LONGROPE else 32}
    rope = {**kind, "original_max_position_embeddings": 32} if kind is LONGROPE else kind
    model = model_of(hf.LlamaConfig(**sizes, rope_parameters=rope))
    fresh, text = copy.deepcopy(model), torch.arange(3, 15)
    with torch.inference_mode():
        model(torch.arange(48)[None])
        expected = fresh(text[None]).logits[0, -1]
    engine = engine_of(model, max_length=32)
    engine.prefill([0], [text])
    none = torch.zeros(1, 0, dtype=torch.int64)
    torch.testing.assert_close(
        engine.logits(engine.verify(torch.tensor([0]), none, none, none.bool()))[0, 0], expected, rtol=0, atol=1e-4
    )


def test_a_second_engine_of_a_model_checks_its_own_length() -> None:
    model = model_of(REFUSED["dynamic"][0]())
    engine_of(model, max_length=32)
    with pytest.raises(UnsupportedModelError, match=r"dynamic RoPE.* \(got 64\)"):
        engine_of(model)


def test_a_second_engine_serves_a_model_further_than_the_first() -> None:
    model, prompt = model_of(FAMILIES["attention scaled by position"][1]()), torch.tensor([5, 9, 11, 7, 21])
    text = generated(model, prompt, 50)
    engine_of(model, max_length=15)  # attention is not scaled up to here
    assert served(engine_of(model), [prompt], [text], drafted=True)[0] == [text]


SHORT = {"original_max_position_embeddings": 32}
REFUSED: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "longrope": (
        lambda: hf.LlamaConfig(**HEADS, rope_parameters={**LONGROPE, **SHORT}),
        r"LlamaForCausalLM has longrope RoPE.* beyond 32 tokens.*; set engine.max_length <= 32 \(got 64\)",
    ),
    "dynamic": (
        lambda: hf.LlamaConfig(
            **HEADS, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, **SHORT}
        ),
        r"LlamaForCausalLM has dynamic RoPE.*; set engine.max_length <= 32 \(got 64\)",
    ),
    "convolutions": (
        lambda: hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"]),
        "Lfm2ForCausalLM has layers of the kind conv, which keep a state .*; serve it by another",
    ),
    "recurrent": (
        lambda: hf.MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=3, state_size=4),
        "MambaForCausalLM has layers of the kind mamba, which keep a state .*; serve it by another",
    ),
    "linear attention": (
        lambda: hf.Qwen3NextConfig(
            **HEADS, layer_types=["linear_attention", "full_attention", "linear_attention"], num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        ),  # fmt: skip
        "Qwen3NextForCausalLM has layers of the kind linear_attention, which keep a state .*; serve it by another",
    ),
    "chosen keys": (
        lambda: hf.LlamaConfig(**HEADS, layer_types=["deepseek_sparse_attention", *["full_attention"] * 2]),
        "layers of the kind deepseek_sparse_attention, which choose the keys that they read; engine.name=sglang may",
    ),
    "temperature": (
        lambda: hf.Llama4TextConfig(**HEADS, **LLAMA4, attention_chunk_size=8, floor_scale=16),
        r"Llama4ForCausalLM scales attention .* position 16 on.*; set engine.max_length <= 15 \(got 64\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_see_what_no_tree_can_show_them_are_refused_by_name(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        engine_of(model_of(config()))
