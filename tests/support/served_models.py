"""Random causal LMs of many families, each with the form in which the engine serves it, and their greedy texts."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from aurora_rl.envs import Request, SamplingParams, SpecDecodeEnv, TransformersEngine

# Wide weights: a random model with small ones has nearly flat logits, and everything would agree by chance.
SIZES: dict[str, Any] = dict(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    pad_token_id=0,
)  # fmt: skip
HEADS = {**SIZES, "head_dim": 8}
GPT = dict(
    vocab_size=48, n_embd=32, n_layer=3, n_head=4, n_positions=256, initializer_range=0.3, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
OPT = dict(
    vocab_size=48, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=256, init_std=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
MLA = dict(
    num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
    topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
    v_head_dim=6,
)  # fmt: skip
LLAMA4 = dict(intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1, no_rope_layers=[1, 0, 1])
MOE = dict(num_local_experts=4, num_experts_per_tok=2)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, factor=4.0, short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[4.0, 5.0, 6.0, 7.0],
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
SCALED = {**YARN, "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}


def glm4_moe() -> PretrainedConfig:
    return hf.Glm4MoeConfig(
        **HEADS, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1,
        first_k_dense_replace=1,
    )  # fmt: skip


# The form in which each family is served, and its configuration.
FAMILIES: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    "llama": ("fused", lambda: hf.LlamaConfig(**HEADS)),
    "odd head groups, tied": (
        "fused",
        lambda: hf.LlamaConfig(
            **{**HEADS, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}, tie_word_embeddings=True
        ),
    ),
    "yarn": ("fused", lambda: hf.LlamaConfig(**HEADS, rope_parameters=YARN)),
    "longrope": (
        "fused",
        lambda: hf.LlamaConfig(**HEADS, rope_parameters={**LONGROPE, "original_max_position_embeddings": 128}),
    ),
    "mistral": ("fused", lambda: hf.MistralConfig(**HEADS, sliding_window=8)),
    "qwen3, some layers slide": (
        "fused",
        lambda: hf.Qwen3Config(**HEADS, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    ),
    "gemma 2": (
        "grouped",
        lambda: hf.Gemma2Config(
            **HEADS, sliding_window=8, query_pre_attn_scalar=8, attn_logit_softcapping=5.0, tie_word_embeddings=False,
            final_logit_softcapping=8.0,
        ),  # fmt: skip
    ),
    "gemma 3": (
        "grouped",
        lambda: hf.Gemma3TextConfig(**HEADS, sliding_window=8, layer_types=ALTERNATING, tie_word_embeddings=False),
    ),
    "gpt-oss": ("grouped", lambda: hf.GptOssConfig(**HEADS, **MOE, sliding_window=8, rope_parameters=YARN)),
    "gpt-2": ("grouped", lambda: hf.GPT2Config(**GPT)),
    "gpt-neox": (
        "grouped",
        lambda: hf.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    ),
    "opt": ("grouped", lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=32)),
    "opt, projected": ("grouped", lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False)),
    "bloom": (
        "eager",
        lambda: hf.BloomConfig(
            vocab_size=48, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.3, bos_token_id=None,
            eos_token_id=None, pad_token_id=0,
        ),  # fmt: skip
    ),
    "deepseek v3": ("grouped", lambda: hf.DeepseekV3Config(**{**SIZES, **MLA})),
    "llama 4": (
        "grouped",
        lambda: hf.Llama4TextConfig(**HEADS, **LLAMA4, attention_chunk_size=8, attn_temperature_tuning=False),
    ),
    "granite": ("grouped", lambda: hf.GraniteConfig(**SIZES, logits_scaling=4.0, residual_multiplier=0.5)),
    "cohere": ("grouped", lambda: hf.CohereConfig(**SIZES, logit_scale=0.5)),
    # What a fused layer of Llama's parts would leave out.
    "clipped projections": ("grouped", lambda: hf.OlmoConfig(**SIZES, clip_qkv=1.0)),
    "attention scaled by position": (
        "grouped",
        lambda: hf.Ministral3Config(**HEADS, sliding_window=None, rope_parameters=dict(SCALED)),
    ),
    "partial rotary": ("grouped", glm4_moe),
}  # fmt: skip


def model_of(config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.to(dtype).eval().requires_grad_(False)


def engine_of(model: PreTrainedModel, *, slots: int = 1, max_length: int = 64) -> TransformersEngine:
    return TransformersEngine(model, num_slots=slots, max_length=max_length, feature_layers=())


@torch.inference_mode()
def generated(model: PreTrainedModel, prompt: Tensor, count: int) -> list[int]:
    model = copy.deepcopy(model)
    out = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=count, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def served(
    engine: TransformersEngine, prompts: Sequence[Tensor], texts: Sequence[list[int]], *, drafted: bool
) -> tuple[list[list[int]], int]:
    """Greedy texts and the rounds they took; trees hold the right path among wrong nodes, and errors in it."""
    rng, nodes = random.Random(0), 6
    queue = [
        Request(i, prompt, SamplingParams(max_tokens=len(text)))
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    done: dict[int, list[int]] = {}
    # Not a SpeculativeDecoder: the trees below come from no drafter, and callers choose the engine's settings.
    env = SpecDecodeEnv(
        engine,
        lambda: queue.pop(0) if queue else None,
        num_nodes=nodes,
        on_completion=lambda completion: done.update({completion.request.id: completion.tokens.tolist()}),
    )
    td, rounds = env.reset(), 0
    while env.num_active:
        tokens = torch.zeros(engine.num_slots, nodes, dtype=torch.int64)
        parents, mask = torch.full_like(tokens, -1), torch.zeros_like(tokens, dtype=torch.bool)
        for slot in engine.store.occupied.tolist() if drafted else []:
            at, parent = int(engine.store.lengths[slot] - engine.store.prompt_lengths[slot]), -1
            right = texts[env.request_of(slot).id][at : at + nodes // 2]
            for node in range(nodes):
                true = node % 2 == 1 and node // 2 < len(right)
                tokens[slot, node] = (
                    right[node // 2] if true and rng.random() > 0.2 else rng.randrange(engine.vocab_size)
                )
                parents[slot, node], mask[slot, node] = parent, True
                parent = node if true else parent
        td["draft"] = {"tokens": tokens, "parents": parents, "mask": mask, "log_probs": torch.zeros(tokens.shape)}
        _, td = env.step_and_maybe_reset(td)
        rounds += 1
    return [done[i] for i in range(len(prompts))], rounds
