"""The training state on disk: weights, optimizer states and the learner's counters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aurora_rl.collectors.codec import checksum
from aurora_rl.plausible import implausible
from aurora_rl.storage import CheckpointError, read_folder, write_folder

_CHECKSUM = "checksum"  # in the document


def save_training_state(
    folder: str | os.PathLike[str],
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    progress: Mapping[str, Any],
) -> None:
    """Write what a learner needs to go on: weights, optimizer states, and its counters, with a checksum."""
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{i}.{index}.{name}": torch.as_tensor(v) for name, v in state.items()})
    write_folder(folder, tensors, {"progress.json": {**progress, _CHECKSUM: checksum(tensors)}})


def load_training_state(
    folder: str | os.PathLike[str], module: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Restore what :func:`save_training_state` wrote and return the counters.

    Raises:
        CheckpointError: The folder is missing or broken, or was written for another drafter; names the first tensor.
    """
    tensors, progress = read_folder(folder, "progress.json")
    written = progress.pop(_CHECKSUM, None)  # earlier releases wrote none
    if written is not None and written != checksum(tensors):
        raise CheckpointError(f"{folder}: the tensors are not those that were written; take an older checkpoint")
    for name, tensor in tensors.items():
        if (fault := implausible(tensor)) is not None:
            raise CheckpointError(f"{folder}: tensor {name!r} {fault}; take an older checkpoint")
    weights = {name[len("module.") :]: t for name, t in tensors.items() if name.startswith("module.")}
    for name, value in module.state_dict().items():
        if name not in weights or weights[name].shape != value.shape:
            found = tuple(weights[name].shape) if name in weights else "missing"
            raise CheckpointError(f"{folder}: tensor {name!r} is {found}, this drafter needs {tuple(value.shape)}")
    unknown = sorted(weights.keys() - module.state_dict().keys())
    if unknown:
        raise CheckpointError(f"{folder}: tensor {unknown[0]!r} is unknown to this drafter")
    module.load_state_dict(weights)
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, *rest = name.split(".", 3)
            if kind == "optimizer" and int(rest[0]) == i:
                state.setdefault(int(rest[1]), {})[rest[2]] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress
