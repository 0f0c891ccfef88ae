"""Adapters of a drafter on disk, as PEFT has LoRA: ``adapters/NAME`` in the drafter's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aurora_rl.plausible import implausible
from aurora_rl.policies.adapters import adapted_layers, add_adapters
from aurora_rl.policies.drafter import Drafter
from aurora_rl.storage import CheckpointError, complete_folder

ADAPTERS = "adapters"
"""Folder of the adapters in that of a drafter; engines look for no weights in it."""
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OTHER_DELTAS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")  # settings of PEFT by which it is not B A


def _matrices(drafter: Drafter, place: int) -> dict[str, Tensor]:
    """Return the matrices of the adapter at a place among a drafter's, by PEFT's names."""
    return {
        f"base_model.model.{path}.{matrix}.weight": getattr(layer, matrix)[place]
        for path, layer in adapted_layers(drafter).items()
        for matrix in ("lora_A", "lora_B")
    }


def adapter_files(drafter: Drafter) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors and the documents of a drafter's adapters by the paths of their files in its folder.

    Example:
        >>> from aurora_rl.models.parts import TargetParts
        >>> from aurora_rl.policies import Eagle3Drafter
        >>> from aurora_rl.testing import tiny_target
        >>> drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
        >>> add_adapters(drafter, ["acme"], rank=4)
        >>> tensors, documents = adapter_files(drafter)
        >>> list(tensors), list(documents)
        (['adapters/acme/adapter_model.safetensors'], ['adapters/acme/adapter_config.json'])
    """
    if drafter.adapters is None:
        return {}, {}
    names, rank = drafter.adapters.names, drafter.adapters.rank
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,  # the delta is B A, times alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
        "target_modules": list(adapted_layers(drafter)),
    }
    tensors = {f"{ADAPTERS}/{name}/{_WEIGHTS}": _matrices(drafter, place) for place, name in enumerate(names)}
    return tensors, {f"{ADAPTERS}/{name}/{_CONFIG}": config for name in names}


def adapter_ranks(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Return the adapters that a drafter's folder holds, and their ranks.

    Raises:
        CheckpointError: One cannot be read.
    """
    folders = sorted((complete_folder(folder) / ADAPTERS).glob(f"*/{_CONFIG}"))
    return {path.parent.name: _rank_of(path.parent) for path in folders}


def read_adapters(drafter: Drafter, folder: str | os.PathLike[str] | None, names: Sequence[str], rank: int) -> None:
    """Give a drafter, in training form, the adapters of these names: those of a folder, and new ones for other names.

    Args:
        drafter: Drafter without adapters.
        folder: The drafter's folder; None has no adapters.
        names: Names of the adapters. What else the folder has is left there.
        rank: Rank of the adapters.

    Raises:
        ValueError: The drafter takes no adapters, or not these, see ``add_adapters``.
        CheckpointError: The folder has an adapter of another rank, of other layers, or one that cannot be read.
    """
    add_adapters(drafter, names, rank)
    for place, name in enumerate(names):
        held = None if folder is None else complete_folder(folder) / ADAPTERS / name
        if held is not None and held.is_dir():
            _read(drafter, held, place, rank)


def _rank_of(folder: Path) -> int:
    try:
        config = json.loads((folder / _CONFIG).read_text())
        rank, scale, others = config["r"], config["lora_alpha"], [each for each in _OTHER_DELTAS if config.get(each)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / _CONFIG} is no adapter's: {error!r}") from error
    if others:
        raise CheckpointError(
            f"{folder / _CONFIG} sets {', '.join(others)}, which is not supported; make it plain LoRA first"
        )
    if type(rank) is not int or scale != rank:
        raise CheckpointError(
            f"{folder / _CONFIG}: r must be an integer, and lora_alpha the same, got {rank!r}, {scale!r}"
        )
    return rank


@torch.no_grad()
def _read(drafter: Drafter, folder: Path, place: int, rank: int) -> None:
    """Read an adapter's folder into a place among a drafter's adapters."""
    if (found := _rank_of(folder)) != rank:
        raise CheckpointError(f"{folder} has an adapter of rank {found}, not {rank}; set drafter.adapter_rank={found}")
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / _WEIGHTS} cannot be read: {error}") from error
    own = _matrices(drafter, place)
    if own.keys() != tensors.keys():
        (name, *_) = sorted(own.keys() ^ tensors.keys())
        state = "missing" if name in own else "unknown to this drafter"
        raise CheckpointError(f"{folder}: tensor {name!r} is {state}; was it learned on another drafter?")
    for name, tensor in tensors.items():
        fault = implausible(tensor)
        if tensor.shape != own[name].shape:
            fault = f"has shape {tuple(tensor.shape)}, this drafter needs {tuple(own[name].shape)}"
        if fault is not None:
            raise CheckpointError(f"{folder}: tensor {name!r} {fault}; was it learned on another drafter?")
        own[name].copy_(tensor)
