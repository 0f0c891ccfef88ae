"""Tiny models and conformance checks, for this project's tests and for third parties' parts."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM


def tiny_target(
    architecture: str = "llama", *, vocab_size: int = 32, num_layers: int = 3, dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> PreTrainedModel:
    """A random causal LM of hidden size 16, for tests.

    Args:
        architecture: "llama" or "qwen3".
        vocab_size: its vocabulary.
        num_layers: its decoder layers.
        dtype: its dtype.
        seed: of its weights.

    Example:
        >>> tiny_target("qwen3").dtype
        torch.float64
    """
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)
    }[architecture]
    config = config_class(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=512,
        # Wide weights: a random model with small ones has nearly flat logits, and everything would agree by chance.
        initializer_range=0.4, bos_token_id=None, eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config).to(dtype).eval().requires_grad_(False)
