"""Training state on disk: tensors as safetensors, the rest as JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the fix."""


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that whoever may read the folder can read, as the umask says.

    Safetensors itself makes files that only their owner can read.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def write_folder(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], documents: Mapping[str, Any]) -> None:
    """Replace ``folder`` by one with ``model.safetensors`` and a JSON file for each document.

    A call that is killed at any point leaves the old folder or the new one to :func:`read_folder`. One process writes.

    Raises:
        OSError: it cannot be written, as on a full disk; names the folder, which is as it was.
    """
    folder = Path(folder)
    made, old = (folder.with_name(f".{folder.name}-{state}") for state in ("new", "old"))
    shutil.rmtree(made, ignore_errors=True)  # of a call that was killed
    try:
        made.mkdir(parents=True)
        save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, made / "model.safetensors")
        for name, document in documents.items():
            (made / name).write_text(json.dumps(document, indent=2) + "\n")
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        shutil.rmtree(made, ignore_errors=True)
        raise OSError(f"{folder} cannot be written: {error}") from error
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(made, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_folder(folder: str | os.PathLike[str], document: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and one document of a folder that :func:`write_folder` made, or of one with PyTorch's ``.bin`` in place.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    folder = Path(folder)
    old = folder.with_name(f".{folder.name}-old")
    if old.exists() and not folder.exists():  # the writer was killed between its two renames
        folder = old
    try:
        older = folder / "pytorch_model.bin"
        if older.exists() and not (folder / "model.safetensors").exists():
            # Tensors only: nothing else in the file is brought to life.
            tensors = torch.load(older, map_location="cpu", weights_only=True)
        else:
            tensors = load_file(folder / "model.safetensors")
        return tensors, json.loads((folder / document).read_text())
    except (OSError, SafetensorError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint: {error}; give a folder with model.safetensors and {document}"
        ) from error


def save_training_state(
    folder: str | os.PathLike[str],
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    progress: Mapping[str, Any],
) -> None:
    """Write what a learner needs to go on: weights, optimizer states and its counters."""
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{i}.{index}.{name}": torch.as_tensor(v) for name, v in state.items()})
    write_folder(folder, tensors, {"progress.json": dict(progress)})


def load_training_state(
    folder: str | os.PathLike[str], module: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Restore what :func:`save_training_state` wrote and return the counters.

    Raises:
        CheckpointError: the folder is missing or broken, or was written for another drafter; names the first tensor.
    """
    tensors, progress = read_folder(folder, "progress.json")
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
