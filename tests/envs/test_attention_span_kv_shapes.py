"""Shapes of keys and values: those that a model's own cache holds after a pass, and models that have none."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from served_models import FAMILIES, model_of

from aurora_rl.envs.attention_span import kv_shapes
from aurora_rl.envs.exactness import UnsupportedModelError
from aurora_rl.models.kv_cache import KVShape


@pytest.mark.parametrize("family", ["llama", "odd head groups, tied", "gpt-2", "bloom", "gemma 3", "deepseek v3"])
def test_shapes_are_those_of_the_models_own_cache(family: str) -> None:
    model = model_of(FAMILIES[family][1]())
    cache = hf.DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3, 4]]), past_key_values=cache, use_cache=True)
    expected = {  # transformers: [batch, heads, tokens, size]
        number: tuple(KVShape(states.shape[1], states.shape[3]) for states in (layer.keys, layer.values))
        for number, layer in enumerate(cache.layers)
    }
    assert kv_shapes(model) == expected


def test_a_model_without_keys_and_values_is_refused_by_name() -> None:
    model = model_of(hf.MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(
        UnsupportedModelError,
        match="MambaForCausalLM cannot verify trees: it keeps no keys and values .*; serve it by another server",
    ):
        kv_shapes(model)


def test_a_model_that_does_not_run_with_a_cache_is_refused_with_the_reason() -> None:
    model = model_of(FAMILIES["llama"][1]())

    def fail(module: torch.nn.Module, args: tuple) -> None:
        raise RuntimeError("no such cache")

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(
        UnsupportedModelError,
        match="LlamaForCausalLM does not run with a cache of keys and values .*no such cache.*; engine.name=sglang may",
    ):
        kv_shapes(model)
