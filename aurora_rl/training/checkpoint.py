"""The training state on disk: weights, optimizer states and the learner's counters."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from aurora_rl.collectors.codec import checksum
from aurora_rl.plausible import implausible
from aurora_rl.storage import CheckpointError, read_folder, write_folder
from aurora_rl.training.states import StateError, check_state, states

logger = logging.getLogger(__name__)

_CHECKSUM = "checksum"  # key in the document


@dataclass(frozen=True)
class TrainingState:
    """A state that :func:`save_training_state` wrote.

    Attributes:
        folder: Its folder.
        progress: The counters.
        tensors: Every tensor by its name in the file.
    """

    folder: Path
    progress: dict[str, Any]
    tensors: dict[str, Tensor]

    def weights(self, name: str) -> dict[str, Tensor] | None:
        """Return the weights that were saved under a name; None if there are none."""
        return {key[len(name) + 1 :]: t for key, t in self.tensors.items() if key.startswith(f"{name}.")} or None

    def stage(self, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Callable[[], None]:
        """Check weights and optimizer states, and return a function that puts them in place.

        Raises:
            CheckpointError: They are of another drafter; names the first tensor.
        """
        folder, weights, own = self.folder, self.weights("module") or {}, module.state_dict()
        for name, value in own.items():
            if name not in weights or weights[name].shape != value.shape:
                found = tuple(weights[name].shape) if name in weights else "missing"
                raise CheckpointError(f"{folder}: tensor {name!r} is {found}, this drafter needs {tuple(value.shape)}")
        if unknown := sorted(weights.keys() - own.keys()):
            raise CheckpointError(f"{folder}: tensor {unknown[0]!r} is unknown to this drafter")
        found_states = [self._of_optimizer(i, optimizer) for i, optimizer in enumerate(optimizers)]

        def put() -> None:
            module.load_state_dict(weights)
            for optimizer, state in zip(optimizers, found_states, strict=True):
                optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

        return put

    def _of_optimizer(self, number: int, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in self.tensors.items():
            kind, *rest = name.split(".", 3)
            if kind != "optimizer" or int(rest[0]) != number:
                continue
            index = int(rest[1])
            if index >= len(parameters) or (value.ndim and value.shape != parameters[index].shape):
                raise CheckpointError(
                    f"{self.folder}: tensor {name!r} {tuple(value.shape)} fits no parameter; was it written with other "
                    "optimizers?"
                )
            state.setdefault(index, {})[rest[2]] = value
        return state


def save_training_state(
    folder: str | os.PathLike[str],
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    progress: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
) -> None:
    """Write what a learner needs to go on: weights, optimizer states, and its counters, with a checksum.

    Args:
        folder: Folder to write to; a state in it is replaced.
        module: Drafter in training.
        optimizers: Optimizers of its parameters.
        progress: Counters, as JSON values.
        weights: More weights by name, such as those that are served.
    """
    tensors = training_tensors(module, optimizers)
    for kind, values in weights.items():
        tensors.update({f"{kind}.{name}": value for name, value in values.items()})
    write_folder(folder, tensors, {"progress.json": {**progress, _CHECKSUM: checksum(tensors)}})


def training_tensors(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return weights and optimizer states by their names in a training state, as `TrainingState.stage` takes them."""
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{i}.{index}.{name}": torch.as_tensor(v) for name, v in state.items()})
    return tensors


def read_training_state(folder: str | os.PathLike[str]) -> TrainingState:
    """Read what :func:`save_training_state` wrote.

    Raises:
        CheckpointError: The folder is missing or broken; names the first tensor.
    """
    tensors, progress = read_folder(folder, "progress.json")
    written = progress.pop(_CHECKSUM, None)  # earlier releases wrote none
    if written is not None and written != checksum(tensors):
        raise CheckpointError(f"{folder}: the tensors are not those that were written; take an older checkpoint")
    for name, tensor in tensors.items():
        if (fault := implausible(tensor)) is not None:
            raise CheckpointError(f"{folder}: tensor {name!r} {fault}; take an older checkpoint")
    return TrainingState(Path(folder), progress, tensors)


def load_training_state(
    folder: str | os.PathLike[str], module: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Restore what :func:`save_training_state` wrote and return the counters.

    Raises:
        CheckpointError: The folder is missing or broken, or was written for another drafter; names the first tensor.
    """
    state = read_training_state(folder)
    state.stage(module, optimizers)()
    return state.progress


def newest_training_state(folder: str | os.PathLike[str]) -> tuple[TrainingState, list[str]]:
    """Read the newest state of a folder that is whole, and say which newer ones are not.

    Returns:
        The state, and a line for each newer one, which the log has, too.

    Raises:
        CheckpointError: There is none; says what is wrong with each.
    """
    refused: list[str] = []
    for each in states(folder):
        try:
            check_state(each)
            state = read_training_state(each)
        except (StateError, CheckpointError) as error:
            refused.append(str(error))
            continue
        if refused:
            logger.warning(
                "learning goes on from the older state %s, as newer ones are broken: %s", each, "; ".join(refused)
            )
        return state, refused
    reasons = "; ".join(refused) or "it holds none"
    raise CheckpointError(f"{folder}: no training state can be used: {reasons}; leave learner.resume out to start anew")
