"""New drafter weights into SGLang's draft runner, and back out to see that they are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# SGLang fuses these projections; the parts follow each other along the rows.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class SwapError(ValueError):
    """Weights that the engine did not take; the message says which and why."""


def load_drafter(updater: Any, runner: Any, weights: dict[str, Tensor]) -> None:
    """Replace the drafter's weights between two batches, in a session of SGLang for the draft runner alone.

    ``weights`` are tensors by checkpoint names, without the draft map, which must not change.

    Raises:
        SwapError: A session is open already, or what the runner holds afterwards differs from ``weights``.
    """
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput, EndWeightUpdateReqInput

    _check(read_back(runner.model, weights), weights)  # SGLang skips names that it does not know
    opened = updater.begin_weight_update(BeginWeightUpdateReqInput(selector="draft"))
    if not opened.success:
        raise SwapError(f"SGLang opens no session: {opened.message}")
    try:
        loaded, message = runner.weight_updater.update_weights_from_tensor(named_tensors=list(weights.items()))
        if not loaded:
            raise SwapError(f"SGLang did not load the weights: {message}")
        # Before the session ends: what follows may pack weights for the hardware.
        held = _check(read_back(runner.model, weights), weights)
        for name, tensor in weights.items():
            if not torch.equal(held[name], tensor.to(held[name])):
                raise SwapError(f"{name!r} in SGLang's drafter is not what was loaded")
    finally:
        closed = updater.end_weight_update(EndWeightUpdateReqInput())
    if not closed.success:
        raise SwapError(f"SGLang does not close its session: {closed.message}")


def read_back(model: Any, names: Any) -> dict[str, Tensor]:
    """Return views of a draft model's parameters under their checkpoint names, without names that it does not have."""
    held = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for name in names:
        inside = name.replace("midlayer.", "layers.0.")
        for fused, parts in _FUSED.items():
            for part in parts:
                if f".{part}." in inside and (whole := _parameter(held, inside.replace(part, fused))) is not None:
                    found[name] = whole.split(_part_sizes(model, inside, fused, len(whole)))[parts.index(part)]
        if name not in found and (own := _parameter(held, inside)) is not None:
            found[name] = own
    return found


def _check(held: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in weights.items():
        if name not in held:
            raise SwapError(f"SGLang's drafter has no parameter for {name!r}")
        if held[name].shape != tensor.shape:
            raise SwapError(f"{name!r} has shape {tuple(tensor.shape)}, SGLang's drafter {tuple(held[name].shape)}")
    return held


def _parameter(held: dict[str, Tensor], name: str) -> Tensor | None:
    return next((held[known].data for known in (name, f"model.{name}") if known in held), None)


def _part_sizes(model: Any, name: str, fused: str, rows: int) -> list[int]:
    """Return the number of rows of each part of a fused projection."""
    if fused == "gate_up_proj":
        return [rows // 2, rows // 2]
    attention = model.get_submodule("model." + name.split(".self_attn.")[0] + ".self_attn")
    return [attention.q_size, attention.kv_size, attention.kv_size]
