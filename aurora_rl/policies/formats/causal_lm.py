"""Folders of causal LMs as Hugging Face and every engine load them, for drafters that are one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from aurora_rl.models.kv_cache import sliding_window
from aurora_rl.models.parts import TargetParts
from aurora_rl.models.target_head import context_length
from aurora_rl.policies.drafter import Checkpoint, check_draft_vocab, check_weights
from aurora_rl.policies.formats.checks import check_fixed_rope, written_config
from aurora_rl.policies.registry import OWN_NAME

if TYPE_CHECKING:
    from aurora_rl.policies.standalone import StandaloneDrafter

# Rows of embedding and head of a model that is built for its layers: as many as the drafter's probe of it needs.
_FEW = 8
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The reduced draft vocabulary in config.json. Not `draft_vocab_size`, by which EAGLE-3's own files are known.
_DRAFT_VOCAB = "aurora_rl_draft_vocab"


def write_causal_lm(drafter: StandaloneDrafter) -> Checkpoint:
    """Return the drafter as a causal LM's folder has it, one format for all engines.

    Engines want every row of the head. ``config.json`` names the draft vocabulary; rows outside it were not trained.
    """
    tensors = {name: value.detach() for name, value in drafter.state_dict().items()}
    head = drafter.whole_head.to(tensors[_HEAD], copy=True)
    head[drafter.draft_vocab] = tensors[_HEAD]
    tensors |= {_EMBEDDING: drafter.model.embed_tokens.weight.detach(), _HEAD: head}
    entries = {
        **written_config(drafter.config, head.dtype),
        "tie_word_embeddings": False,  # the head learns, the embedding does not
        OWN_NAME: "standalone",  # a Llama of one layer would pass for an EAGLE of its authors
    }
    if drafter.draft_vocab.tolist() != list(range(drafter.vocab_size)):
        entries[_DRAFT_VOCAB] = drafter.draft_vocab.tolist()
    return Checkpoint(tensors, entries)


def read_causal_lm(checkpoint: Checkpoint, parts: TargetParts) -> dict[str, Any]:
    """Return the arguments of ``StandaloneDrafter`` that the folder of a causal LM holds, its weights in one file.

    Raises:
        ValueError: Names the first entry or tensor that does not fit the target or the class.
    """
    entries = dict(checkpoint.config)
    entries.pop(OWN_NAME, None)
    vocab = torch.tensor(entries.pop(_DRAFT_VOCAB, range(len(parts.head))))
    check_draft_vocab(vocab, len(parts.head), f"config.json: {_DRAFT_VOCAB}")
    if "model_type" not in entries:
        raise ValueError("config.json: model_type is missing; it says which architecture the tensors are of")
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    check_causal_lm(config, parts, "config.json: the model")
    # Old exports carry the rotary frequencies, which the configuration gives.
    tensors = {name: t for name, t in checkpoint.tensors.items() if not name.endswith("inv_freq")}
    if config.tie_word_embeddings and _HEAD not in tensors and _EMBEDDING in tensors:
        tensors[_HEAD] = tensors[_EMBEDDING]
    lm = layers_of(config)
    tables = {name: torch.empty(len(parts.head), config.hidden_size, device="meta") for name in (_EMBEDDING, _HEAD)}
    check_weights(lm.state_dict() | tables, tensors)
    lm.load_state_dict({name: t[:_FEW] if name in tables else t for name, t in tensors.items()})
    return {"lm": lm, "embedding": tensors[_EMBEDDING].float(), "head": tensors[_HEAD].float(), "draft_vocab": vocab}


def load_causal_lm(model: str) -> PreTrainedModel:
    """Load a causal LM in float32; every weight must be there."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # the loaders raise whatever their parsers raise: OSError, KeyError, SafetensorError
        raise ValueError(f"the model {model!r} cannot be loaded; name a folder or hub id: {error}") from error
    lm, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the model {model!r} has no weights {missing[0]!r}; name a complete folder of a causal LM")
    return lm


def layers_of(config: PretrainedConfig) -> PreTrainedModel:
    """Return a causal LM of random weights with a few rows of embedding and head, which come from elsewhere."""
    config = copy.deepcopy(config)
    config.vocab_size, config.pad_token_id, config.tie_word_embeddings = _FEW, None, False
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def check_causal_lm(config: PretrainedConfig, parts: TargetParts, name: str) -> None:
    """Raise ValueError where an LM cannot draft for a target, whatever its weights."""
    check_fixed_rope(config, name)
    vocab, context = len(parts.head), context_length(parts.config)
    if config.vocab_size != vocab:
        raise ValueError(
            f"{name} has a vocabulary of {config.vocab_size} tokens, the target one of {vocab}; a standalone drafter "
            "needs the target's tokenizer"
        )
    if (window := sliding_window(config)) is not None and (context is None or window < context):
        raise ValueError(
            f"{name} slides its attention over {window} tokens, and the target has a context of "
            f"{context or 'any length'}; the drafter's cache has no windows"
        )
