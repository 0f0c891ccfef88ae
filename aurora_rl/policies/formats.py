"""Drafter checkpoints as serving engines read them: config.json and model.safetensors under EAGLE-3's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from aurora_rl.checkpoints import CheckpointError, read_folder, write_folder
from aurora_rl.policies.eagle3 import Eagle3Drafter
from aurora_rl.policies.target import TargetParts


def save_eagle3(drafter: Eagle3Drafter, folder: Path) -> None:
    """Write a drafter as SGLang's ``LlamaForCausalLMEagle3`` (and vLLM) load it.

    ``d2t`` holds offsets, ``d2t[i] = target id − i``; ``t2d`` marks the target tokens that have a row.
    The embedding is the target's and is left out. SGLang names a captured state by the layer that it leaves (it adds 1
    to each id and captures what enters that layer), this library by the layer that it enters: the ids in the file are
    one less than ``feature_layers``.
    """
    weights = drafter.published()
    known = torch.zeros(drafter.config.vocab_size, dtype=torch.bool)
    known[drafter.draft_vocab.cpu()] = True
    config: dict[str, Any] = {
        **drafter.config.to_dict(),
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": len(drafter.draft_vocab),
        "dtype": str(drafter.fc.weight.dtype).removeprefix("torch."),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in drafter.feature_layers]},
    }
    write_folder(folder, {**weights, "t2d": known}, {"config.json": config})


def load_eagle3(folder: str | Path, parts: TargetParts) -> Eagle3Drafter:
    """Read a drafter for a target, in float32.

    Raises:
        CheckpointError: files are missing or broken, or the drafter was made for another target; names the first
            entry or tensor that does not match.
    """
    folder = Path(folder)
    tensors, document = read_folder(folder, "config.json")
    tensors.pop("t2d", None)
    tensors.pop("embed_tokens.weight", None)
    for name in ("hidden_size", "vocab_size"):
        mine = getattr(parts.config, name)
        if document.get(name) != mine:
            raise CheckpointError(f"{folder}/config.json: {name} is {document.get(name)}, the target has {mine}")
    if "d2t" not in tensors:
        raise CheckpointError(f"{folder}: tensor 'd2t' is missing; is this an EAGLE-3 drafter?")
    layers = (document.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if not layers:
        raise CheckpointError(f"{folder}/config.json: eagle_config.eagle_aux_hidden_state_layer_ids is missing")
    drafter = Eagle3Drafter(
        LlamaConfig.from_dict(document),
        embedding=parts.embedding.float(),
        draft_vocab=torch.arange(len(tensors["d2t"])),
        feature_layers=tuple(layer + 1 for layer in layers),
    )
    try:
        drafter.install(tensors)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return drafter
