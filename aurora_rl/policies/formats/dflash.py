"""DFlash checkpoints: the ``DFlashDraftModel`` that its authors publish and SGLang and vLLM load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Qwen3Config

from aurora_rl.models.parts import TargetParts, target_entries
from aurora_rl.policies.drafter import Checkpoint
from aurora_rl.policies.formats.checks import (
    check_feature_layers,
    check_fixed_rope,
    check_heads_stated,
    check_layers_rise,
    check_rope,
    check_target_depth,
    written_config,
)

if TYPE_CHECKING:
    from aurora_rl.policies.dflash import DFlashDrafter

# Settings of other block drafters that change what is computed, and the value at which they do not.
_UNSUPPORTED: dict[str, Any] = {
    "attention_bias": False,
    "attention_sink_bias": False,
    "attention_value_scale": 1.0,
    "conv_kernel_size": 0,
    "final_logit_softcapping": 0,
    "hidden_act": "silu",
    "input_embedding_scale": 1.0,
    "is_causal": False,
    "output_multiplier": 1.0,
    "projector_type": None,
    "sample_from_anchor": True,
    "selector_rank": 0,
}


def write_dflash(drafter: DFlashDrafter, format: str) -> Checkpoint:
    """Return a DFlash as "hf" or "sglang" has it.

    Neither holds embedding or head, which are the target's. The ids in the file are one less than ``feature_layers``:
    they name a feature by the layer that it leaves. "hf" may also have the embedding, as −1, and what the target's
    head reads; SGLang can read neither. A reduced draft vocabulary is an extra tensor ``d2t``, offsets from
    rows to target ids: SGLang ignores it, and vLLM does not load a file that has it.

    Raises:
        ValueError: SGLang cannot read one of the features.
    """
    if format == "sglang":  # SGLang's DFlash has no place for the embedding
        check_feature_layers(drafter.feature_layers, drafter.num_target_layers, lowest=1)
    tensors = drafter.published()
    entries: dict[str, Any] = {
        **written_config(drafter.config, drafter.fc.weight.dtype),
        "architectures": ["DFlashDraftModel"],
        "block_size": drafter.block_size,
        "num_target_layers": drafter.num_target_layers,
        "dflash_config": {
            "mask_token_id": drafter.mask_token_id,
            "target_layer_ids": [layer - 1 for layer in drafter.feature_layers],
        },
    }
    if len(tensors["d2t"]) == drafter.vocab_size and not bool(tensors["d2t"].any()):
        del tensors["d2t"]
    return Checkpoint(tensors, entries)


def read_dflash(
    checkpoint: Checkpoint, parts: TargetParts, mask_token_id: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of ``DFlashDrafter`` that the files hold, and the tensors to install in it.

    ``mask_token_id`` is for a file that names it by its text alone. ``feature_layers`` are None if no file has them.

    Raises:
        ValueError: Names the first entry or tensor that does not fit the target or the class.
    """
    entries, tensors = checkpoint.config, dict(checkpoint.tensors)
    for name, plain in _UNSUPPORTED.items():
        if (value := _setting(entries, name)) not in (None, plain):
            raise ValueError(
                f"config.json: {name} is {value!r}, which DFlashDrafter does not support; it must be {plain!r}"
            )
    if "sliding_attention" in (entries.get("layer_types") or ()):
        raise ValueError(
            "config.json: layer_types has sliding_attention, which DFlashDrafter does not support; give a drafter with "
            "full attention only"
        )
    check_heads_stated(entries)
    config = Qwen3Config.from_dict({**entries, **target_entries(parts)})
    check_fixed_rope(config)
    check_rope(config, parts)
    check_target_depth(_setting(entries, "num_target_layers"), parts)
    if (mask_token_id := _setting(entries, "mask_token_id", mask_token_id)) is None:
        raise ValueError("config.json: mask_token_id is missing; set the option of the same name")
    layers = _setting(entries, "target_layer_ids")
    check_layers_rise(layers or ())
    tensors.setdefault("d2t", torch.zeros(config.vocab_size, dtype=torch.int64))  # every token has a row
    arguments = {
        "config": config,
        "draft_vocab": torch.arange(len(tensors["d2t"])),
        "feature_layers": tuple(layer + 1 for layer in layers) if layers else None,
        "block_size": _setting(entries, "block_size", 16),
        "mask_token_id": mask_token_id,
    }
    return arguments, tensors


def _setting(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Return an entry of ``dflash_config``, or of the file itself, where older files have it."""
    return (config.get("dflash_config") or {}).get(name, config.get(name, default))
