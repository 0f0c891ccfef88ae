"""Tiny random causal LMs of many families, for what must not assume that a target is a Llama."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aurora_rl.testing.tiny import cast

_SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    # Wide weights: a random model with small ones has nearly flat logits, and everything would agree by chance.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_MOE: dict[str, Any] = {
    **_GROUPED,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MLA: dict[str, Any] = {
    **_MOE,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

# Model types of transformers, and what their configurations say besides the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": {"max_position_embeddings": None},
    "cohere": {**_GROUPED, "logit_scale": 0.25},
    "deepseek_v3": _MLA,
    "falcon": {"multi_query": True, "new_decoder_architecture": False},
    "gemma": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {**_GROUPED, "head_dim": 8, "sliding_window": 16},
    "glm4": {**_GROUPED, "head_dim": 8},
    "glm4_moe": {**_MOE, "head_dim": 8},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {**_MOE, "head_dim": 8},
    "granite": {**_GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "llama": _GROUPED,
    "mixtral": _MOE,
    "mpt": {"max_position_embeddings": None, "max_seq_len": 128},
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
}


def tiny_family(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random causal LM of a family: 48 tokens, hidden size 32, three layers.

    Norms are moved off the values that they start with, as training moves them.

    Args:
        name: Model type of transformers, a key of ``FAMILIES``.
        dtype: Its dtype.
        seed: Of its weights.
        **settings: Further entries of its configuration.
    """
    config = AutoConfig.for_model(name, **{**_SIZES, **FAMILIES[name], **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return cast(model, dtype).eval().requires_grad_(False)
