"""Readings for the checks of objectives: the loss, and whether a batch is refused in words."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aurora_rl.objectives import Objective
from aurora_rl.testing.asserts import require


def total_loss(objective: Objective, batch: TensorDict) -> Tensor:
    """Return all that the objective minimises on a batch, as a scalar."""
    return total_of(objective(batch))


def total_of(out: TensorDictBase) -> Tensor:
    """Return the sum of the losses that an objective has returned, as a scalar."""
    return torch.stack([value.sum() for key, value in out.items() if key.startswith("loss_")]).sum()


def refuses(objective: Objective, batch: TensorDict, what: str, *, naming: str = "") -> bool:
    """Return whether the objective refuses a batch, which is ``what`` in words.

    Raises:
        AssertionError: The refusal is no ValueError that names the objective, and ``naming`` as well.
    """
    try:
        objective(batch)
    except (KeyError, ValueError) as error:
        told = isinstance(error, ValueError) and repr(objective.name) in str(error) and naming in str(error)
        needed = f"{objective.name!r}{f' and {naming}' if naming else ''}"
        require(told, f"{what} ends in {error!r}, and not in a ValueError that names {needed}")
        return True
    return False
