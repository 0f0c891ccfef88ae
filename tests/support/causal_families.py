"""Which causal families of the installed transformers ``TransformersEngine`` serves, tried on a tiny model of each."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import Any, NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from aurora_rl.envs import TransformersEngine
from aurora_rl.envs.exactness import UnsupportedModelError

# Parameters of the largest model that is built; a family whose configuration cannot be made so small is not tried.
_MAX_PARAMETERS = 40_000_000
# Whichever of these a configuration knows. Wide weights: with small ones a random model's logits are nearly flat.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "text_vocab_size", "encoder_hash_byte_group_vocab"), 48
    ),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "dim_ff", "mlp_hidden_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "n_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads", "num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "zero_expert_num", "encoder_layers"), 1),
    "qk_rope_head_dim": 4,
    "layer_norm_epsilon": 1e-5,
    "is_decoder": True,
}
# Further settings of some families, or settings that have another form there.
_MLA = {"num_key_value_heads": 4, "head_dim": ...}  # an ellipsis leaves the family's own value
_SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "youtu", "longcat_flash"), _MLA
    ),
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
        "activation_sparsity_pattern": [0.0] * 5,
    },
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention", "mamba"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh", "local"]},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "zamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba"]},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
}


# What stands for a family that no tiny model of the causal class can be made of.
_NOT_TRIED = {
    "gemma3n": "its vision tower needs the package timm; its text model is gemma3n_text",
    "gemma4_assistant": "a drafter of its target's own states, no model that reads a text",
    "got_ocr2": "its vision tower cannot be made small; its text model is qwen2",
    "musicgen": "it decodes audio codes, not text",
    "musicgen_melody": "it decodes audio codes, not text",
    "zamba": "its layers share weights in a way that no model of four layers can; it has mamba layers, as zamba2",
}
_OUTCOMES = {
    "fused": "exact",
    "grouped": "exact without the fused layer",
    "sdpa": "exact without the fused layer, transformers' SDPA",
    "eager": "exact without the fused layer, transformers' eager attention",
}


class FamilyOutcome(NamedTuple):
    """What became of a family.

    Attributes:
        outcome: One of the values of ``_OUTCOMES``, "refused" or "not tried".
        note: Why it was refused or not tried.
    """

    outcome: str
    note: str


def causal_families() -> list[str]:
    """Return the model types of the causal language models that the installed transformers has, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_family(model_type: str) -> PreTrainedModel:
    """Make a tiny random model of a family, in float32.

    Raises:
        ValueError: Its configuration cannot be made small.

    Example:
        >>> tiny_family("gpt2").config.n_layer
        3
    """
    config = _tiny_config(CONFIG_MAPPING[model_type], _SETTINGS.get(model_type, {}))
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > _MAX_PARAMETERS:
        raise ValueError(f"its configuration does not shrink below {count / 1e6:.0f}M parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _tiny_config(kind: type[PretrainedConfig], settings: dict[str, Any]) -> PretrainedConfig:
    known = {*inspect.signature(kind.__init__).parameters, *kind.attribute_map}
    if dataclasses.is_dataclass(kind):
        known |= {field.name for field in dataclasses.fields(kind)}
    parts = {
        name: _tiny_config(part, _PARTS.get(name, {})).to_dict()
        for name, part in kind.sub_configs.items()
        if part is not transformers.AutoConfig and name not in settings
    }
    values = {**{name: value for name, value in _SMALL.items() if name in known}, **parts, **settings}
    return kind(**{name: value for name, value in values.items() if value is not ...})


# Towers of models that see or hear: they are no part of serving text.
_PARTS: dict[str, dict[str, Any]] = {"vision_config": {"num_hidden_layers": 1, "output_channels": 8, "mlp_dim": 16}}


def try_family(model_type: str) -> FamilyOutcome:
    """Try to serve a tiny model of a family.

    Example:
        >>> try_family("llama")
        FamilyOutcome(outcome='exact', note='')
    """
    if model_type in _NOT_TRIED:
        return FamilyOutcome("not tried", _NOT_TRIED[model_type])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            engine = TransformersEngine(tiny_family(model_type), num_slots=2, max_length=64, feature_layers=(0, 1))
        except UnsupportedModelError as error:
            return FamilyOutcome("refused", str(error))
    return FamilyOutcome(_OUTCOMES[engine.exactness.form], "")
