"""A drafter's ``config.json``: how it is written, and how it is checked against the target."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from aurora_rl.models.parts import FIXED_ROPE, TargetParts, layer_config

logger = logging.getLogger(__name__)
# In config.json: heads or rotary settings are not the target's, and are meant so.
_OWN_ATTENTION = "aurora_rl_attention"
_FIX = " If it was trained with them, set drafter.options={attention: own}"


def written_config(config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the entries of ``config.json`` for a configuration, as engines on transformers 5 and 4 read them.

    Those on 4 look for ``rope_theta``, ``rope_scaling`` and ``torch_dtype``, and would fall back to base 10000.
    """
    name = str(dtype).removeprefix("torch.")
    written = {**config.to_dict(), "dtype": name, "torch_dtype": name}
    rope = dict(written.get("rope_parameters") or {})
    if "rope_theta" in rope:  # not where each type of layer has its own, for which the older form has no place
        written["rope_theta"] = rope.pop("rope_theta")
        written["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return written


def check_rope(config: PretrainedConfig, parts: TargetParts, fix: str = "") -> None:
    """Raise ValueError, with ``fix`` at its end, unless a drafter's positions are the target's.

    Other positions would be wrong far into a text.
    """
    rope, targets = _rope(config), _rope(layer_config(parts))
    if rope != targets:
        raise ValueError(
            f"config.json: rope_parameters are {rope}, the target has {targets}; was the drafter made for another "
            f"target, or were they left out of the file?{fix}"
        )


def check_fixed_rope(config: PretrainedConfig, name: str = "config.json") -> None:
    """Raise ValueError if rotary positions depend on the length of a pass: cached keys would not fit later ones."""
    kind = _rope(config)["rope_type"]
    if kind not in FIXED_ROPE:
        raise ValueError(
            f"{name}: rope_type is {kind!r}, which turns keys by the length of the pass; drafters have "
            f"{', '.join(FIXED_ROPE)}"
        )


def settle_attention(config: PretrainedConfig, entries: Mapping[str, Any], parts: TargetParts, attention: str) -> None:
    """Check heads and positions of a drafter's layer: they may differ from the target's only if meant so.

    Authors of EAGLE train with base 10000 for any target and leave rotary settings out of their files, and engines read
    them so. Any other file whose settings are not the target's is most often for another target. It is a ValueError,
    unless the option ``attention`` is "own" or the file records that it was read so before. Then ``config`` is marked.
    Shapes of tensors do not tell eight heads of two from four of four.
    """
    if attention not in ("target", "own"):
        raise ValueError(f"the option attention must be target or own, got {attention!r}")
    meant = "own" in (attention, entries.get(_OWN_ATTENTION))
    layer = layer_config(parts)
    heads = [
        f"{name} is {getattr(config, name)}, the target has {getattr(layer, name)}"
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
        if getattr(config, name) != getattr(layer, name)
    ]
    if heads and not meant:
        raise ValueError(f"config.json: {heads[0]}; was the drafter made for another target?{_FIX}")
    check_fixed_rope(config)
    rope, targets = _rope(config), _rope(layer)
    if rope != targets and not any(entries.get(name) for name in ("rope_parameters", "rope_theta", "rope_scaling")):
        says = "config.json says nothing of RoPE: the drafter keeps the default of its authors, %s; the target has %s"
        logger.warning(says, rope, targets)
    elif not meant:
        check_rope(config, parts, _FIX)
    if heads or rope != targets:
        setattr(config, _OWN_ATTENTION, "own")


def check_heads_stated(entries: Mapping[str, Any]) -> None:
    """Raise ValueError if a ``config.json`` leaves the number of heads to a default."""
    if entries.get("num_attention_heads") is None:
        raise ValueError("config.json: num_attention_heads is missing, which tensors do not tell; add it to the file")


def refuse_own_attention(attention: str) -> None:
    """Raise ValueError if a drafter that starts from the target is to have an attention of its own."""
    if attention != "target":
        raise ValueError(
            f"the option attention={attention!r} is for a checkpoint, drafter.path; a new drafter has the target's"
        )


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """Return rotary settings without those that stand for their default or that a drafter's layer does not read."""
    settings = {"rope_type": "default", **(getattr(config, "rope_parameters", None) or {})}
    settings.pop("partial_rotary_factor", None)
    return {name: value for name, value in sorted(settings.items()) if value is not None}


def check_target_depth(stated: int | None, parts: TargetParts) -> None:
    """Raise ValueError where a checkpoint was made for a target of other layers; None states nothing."""
    depth = parts.config.num_hidden_layers
    if stated and stated != depth:
        raise ValueError(f"config.json: num_target_layers is {stated}, the target has {depth}")


def check_feature_layers(feature_layers: Sequence[int], num_target_layers: int, *, lowest: int = 0) -> None:
    """Raise ValueError if engines cannot read the features from layer ``lowest`` on, or would reorder them.

    Layer 0 is the embedding.
    """
    for layer in feature_layers:
        if not lowest <= layer < num_target_layers:
            raise ValueError(
                f"feature_layers has {layer}; engines read what enters a layer, {lowest}..{num_target_layers - 1} "
                "of this target"
            )
    check_layers_rise(feature_layers)


def check_layers_rise(feature_layers: Sequence[int]) -> None:
    """Raise ValueError if engines would join the features in another order than that of ``feature_layers``."""
    if sorted(set(feature_layers)) != list(feature_layers):
        raise ValueError(f"feature_layers must rise, got {tuple(feature_layers)}: engines join states in that order")
