"""EAGLE and EAGLE-3 checkpoints as SGLang loads them and as their authors publish them.

A checkpoint holds one Llama layer and what is around it, under the names that the drafters use too. Embeddings in a
file are passed over, and so is EAGLE's head: they are the target's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from aurora_rl.models.parts import TargetParts, default_feature_layers, target_entries
from aurora_rl.policies.drafter import Checkpoint, check_draft_vocab
from aurora_rl.policies.formats.checks import (
    check_feature_layers,
    check_heads_stated,
    check_layers_rise,
    settle_attention,
    written_config,
)
from aurora_rl.policies.formats.vllm import LAYER_IDS, from_vllm, to_vllm

if TYPE_CHECKING:
    from aurora_rl.policies.eagle import EagleDrafter
    from aurora_rl.policies.eagle3 import Eagle3Drafter

logger = logging.getLogger(__name__)

# Settings of other drafters of these architectures that change what is computed.
_UNSUPPORTED_BY_EAGLE3 = ("norm_before_fc", "norm_before_residual", "bias", "attention_bias", "mlp_bias")
_UNSUPPORTED_BY_EAGLE = ("attention_bias", "mlp_bias", "add_para_norm")
# Beginnings of tensors' names in files of EAGLE-3, and here.
_EAGLE3_NAMES = {
    "model.": "",
    "layers.0.": "midlayer.",
    "aux_norm_low": "fc_norm.0",
    "aux_norm_mid": "fc_norm.1",
    "aux_norm_high": "fc_norm.2",
    "draft_id_to_target_id": "d2t",
}


def write_eagle3(drafter: Eagle3Drafter, format: str) -> Checkpoint:
    """Return an EAGLE-3 as "sglang", "vllm" or "hf" has it.

    "sglang" is what ``LlamaForCausalLMEagle3`` loads. Its ``d2t[i] = target id − i`` are offsets, and ``t2d`` marks the
    target tokens that have a row. Its layer ids name the layer that a state leaves, one less than ``feature_layers``.
    "vllm" adds the ids as vLLM reads them. "hf" is the format that the authors publish, which has no layer ids.

    Raises:
        ValueError: The format cannot say what this drafter is.
    """
    config, layers = drafter.config, drafter.feature_layers
    if format != "hf":
        check_feature_layers(layers, config.num_target_layers)
    known = torch.zeros(drafter.vocab_size, dtype=torch.bool)
    known[drafter.draft_vocab.cpu()] = True
    entries: dict[str, Any] = {
        **written_config(config, drafter.fc.weight.dtype),
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": len(drafter.draft_vocab),
        "eagle_config": {LAYER_IDS: [layer - 1 for layer in layers]},
        **{name: True for name, on in drafter.options.items() if on},
    }
    tensors = {**drafter.published(), "t2d": known}
    if format == "vllm":
        return Checkpoint(*to_vllm(tensors, entries))
    if format == "hf":
        usual = default_feature_layers(config.num_target_layers)
        if layers != usual:
            raise ValueError(f"the drafter reads layers {layers}, and files in 'hf' are of {usual}")
        del entries["eagle_config"]
    return Checkpoint(tensors, entries)


def read_eagle3(
    checkpoint: Checkpoint, parts: TargetParts, format: str, attention: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of ``Eagle3Drafter`` and the tensors to install in it.

    A ``format`` of "vllm" reads the entries as vLLM does; files that show it need not be named. ``attention`` is the
    drafter's option of this name.

    Raises:
        ValueError: Names the first entry or tensor that does not fit the target or the class.
    """
    if format == "vllm" or LAYER_IDS in checkpoint.config:  # vLLM alone looks for them at the top level
        checkpoint = Checkpoint(*from_vllm(*checkpoint))
    entries, tensors = checkpoint.config, {_eagle3_name(name): tensor for name, tensor in checkpoint.tensors.items()}
    known = tensors.pop("t2d", None)
    _drop_embedding(tensors, parts)
    config = _layer_config(entries, parts, _UNSUPPORTED_BY_EAGLE3, attention)
    layers = tuple((entries.get("eagle_config") or {}).get(LAYER_IDS) or ())
    check_layers_rise(layers)
    rows = entries.get("draft_vocab_size") or config.vocab_size
    if "d2t" not in tensors and rows == config.vocab_size:
        tensors["d2t"] = torch.zeros(rows, dtype=torch.int64)  # every token has a row
    if "d2t" not in tensors:
        raise ValueError(f"tensor 'd2t' is missing, and draft_vocab_size is {rows} of {config.vocab_size} tokens")
    draft_vocab = _draft_vocab(tensors["d2t"], config.vocab_size)
    if known is not None and not torch.equal(known.nonzero().flatten(), draft_vocab):
        raise ValueError("tensors 't2d' and 'd2t' name different draft vocabularies")
    arguments = {
        "config": config,
        "embedding": parts.embedding.float(),
        "draft_vocab": draft_vocab,
        "feature_layers": tuple(i + 1 for i in layers) or default_feature_layers(parts.config.num_hidden_layers),
        "fc_norm": bool(entries.get("fc_norm") or entries.get("use_aux_norm")),
        "norm_output": bool(entries.get("norm_output")),
    }
    return arguments, tensors


def write_eagle(drafter: EagleDrafter, format: str) -> Checkpoint:
    """Return an EAGLE as "sglang" or "hf" has it.

    "sglang" is what ``LlamaForCausalLMEagle`` loads; "hf" is what the authors publish, a Llama of one layer with the
    embedding. Neither has a place for a draft vocabulary: ``d2t`` is added where it is not the whole vocabulary, and
    SGLang passes it over, for its ``--speculative-token-map``.
    """
    entries: dict[str, Any] = {
        **written_config(drafter.config, drafter.fc.weight.dtype),
        "architectures": ["LlamaForCausalLMEagle" if format == "sglang" else "LlamaForCausalLM"],
        "bias": True,
    }
    tensors = drafter.published()
    if not bool(tensors["d2t"].any()) and len(tensors["d2t"]) == drafter.vocab_size:
        del tensors["d2t"]
    if format == "hf":
        tensors["embed_tokens.weight"] = drafter.embedding
    return Checkpoint(tensors, entries)


def read_eagle(checkpoint: Checkpoint, parts: TargetParts, attention: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of ``EagleDrafter`` and the tensors to install in it; see :func:`read_eagle3`."""
    entries = checkpoint.config
    tensors = {name.removeprefix("model."): tensor for name, tensor in checkpoint.tensors.items()}
    _drop_embedding(tensors, parts)
    tensors.pop("lm_head.weight", None)
    config = _layer_config(entries, parts, _UNSUPPORTED_BY_EAGLE, attention)
    if entries.get("bias") is False:  # as the authors trained their later ones
        tensors.setdefault("fc.bias", torch.zeros(config.hidden_size))
    tensors.setdefault("d2t", torch.zeros(config.vocab_size, dtype=torch.int64))  # every token has a row
    draft_vocab = _draft_vocab(tensors["d2t"], config.vocab_size)
    arguments = {
        "config": config,
        "embedding": parts.embedding.float(),
        "head": parts.head.rows(draft_vocab).float(),
        "draft_vocab": draft_vocab,
        "feature_layers": (parts.config.num_hidden_layers,),
    }
    return arguments, tensors


def _drop_embedding(tensors: dict[str, Tensor], parts: TargetParts) -> None:
    """Take the embedding out, since the target's is used, as in SGLang; say so where some of its rows differ."""
    own, target = tensors.pop("embed_tokens.weight", None), parts.embedding
    if own is None:
        return
    some = torch.arange(0, len(target), max(1, len(target) // 256))
    if own.shape != target.shape or not torch.allclose(own[some].float(), target[some].float().cpu(), 0.02, 1e-3):
        logger.warning(
            "the checkpoint has an embedding of its own, which is not the target's; the target's is used, as SGLang "
            "does, and it may draft worse than where it was trained"
        )


def _layer_config(
    entries: Mapping[str, Any], parts: TargetParts, unsupported: tuple[str, ...], attention: str
) -> LlamaConfig:
    """Check the entries of ``config.json`` about the layer, and return its configuration."""
    for name in unsupported:
        if entries.get(name) or (entries.get("eagle_config") or {}).get(name):
            raise ValueError(f"config.json: {name} is set, which this drafter does not support; give one without it")
    check_heads_stated(entries)
    config = LlamaConfig.from_dict({**entries, **target_entries(parts)})
    if config.num_hidden_layers != 1:
        raise ValueError(f"config.json: num_hidden_layers is {config.num_hidden_layers}, this drafter has one layer")
    settle_attention(config, entries, parts, attention)
    return config


def _draft_vocab(offsets: Tensor, vocab_size: int) -> Tensor:
    draft_vocab = offsets + torch.arange(len(offsets))
    check_draft_vocab(draft_vocab, vocab_size)
    return draft_vocab


def _eagle3_name(name: str) -> str:
    """Return a tensor's name here, of those that EAGLE-3 checkpoints use."""
    for beginning, prefix in _EAGLE3_NAMES.items():
        if name.startswith(beginning):
            name = prefix + name.removeprefix(beginning)
    return name
