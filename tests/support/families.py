"""Tiny random causal LMs of many families, for what must not assume that a target is a Llama."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aurora_rl.sampling_params import SamplingParams
from aurora_rl.testing.tiny import cast
from aurora_rl.trajectories import make_trajectory

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

# Model types of transformers, and further entries of their configurations.
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


def random_family(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Make a random causal LM of a family: 48 tokens, hidden size 32, three layers.

    Norms are moved off the values that they start with, as training moves them.

    Args:
        name: Model type of transformers, a key of ``FAMILIES``.
        dtype: Dtype of the weights.
        seed: Seed of the weights.
        **settings: Further entries of the configuration.
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


class Texts(NamedTuple):
    """Texts that a model sampled, and what it computes of them.

    Attributes:
        tokens: ``[n, S]`` int64.
        hidden_states: ``num_hidden_layers + 1`` tensors ``[n, S, H]``: what enters each layer, and the head's input.
        logits: ``[n, S, V]``.
    """

    tokens: Tensor
    hidden_states: tuple[Tensor, ...]
    logits: Tensor

    def trajectories(self, feature_layers: Sequence[int], *, prompt_length: int = 4) -> list[TensorDict]:
        """As serving would have recorded them without drafts, made without an engine: not every one serves all."""
        trajectories = []
        for request, tokens in enumerate(self.tokens):
            states = [states[request, :-1] for states in self.hidden_states]
            last = states[-1]
            trajectories.append(
                make_trajectory(
                    request=request,
                    tokens=tokens,
                    prompt_length=prompt_length,
                    features=torch.cat([last[:, :0], *(states[layer] for layer in feature_layers)], dim=1),
                    target={"hidden": last[prompt_length - 1 :]},
                    anchors=[],
                    trees=[],
                    policy_versions=[],
                    cache_versions=[],
                    sampling_params=SamplingParams(temperature=1.0, seed=0),
                )
            )
        return trajectories


@torch.no_grad()
def sampled_texts(model: PreTrainedModel, *, number: int, length: int, prompt_length: int = 4, seed: int = 0) -> Texts:
    """Texts of random prompts at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(_SIZES["vocab_size"], (number, prompt_length), generator=generator)
    for _ in range(length - prompt_length):
        law = model(tokens, use_cache=False).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(law, 1, generator=generator)], dim=1)
    out: Any = model(tokens, use_cache=False, output_hidden_states=True)
    return Texts(tokens, out.hidden_states, out.logits)
