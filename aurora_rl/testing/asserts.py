"""Assertions of the conformance checks, and what those of objectives read off a loss."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aurora_rl.objectives import Objective

# Nats between what serving recorded and what training computes: trajectories hold log-probabilities in float32.
RECORDED = {torch.float64: 1e-5, torch.float32: 5e-4}
# Nats between two ways of computing the same log-probability.
COMPUTED = {torch.float64: 1e-9, torch.float32: 5e-4}


def require(condition: bool, message: str) -> None:
    """Assert, also under ``python -O``."""
    if not condition:
        raise AssertionError(message)


def close(a: Tensor, b: Tensor, atol: float) -> bool:
    """Return whether log-probabilities agree to ``atol`` nats."""
    # Where both are −inf they agree, and their difference is not a number.
    return a.shape == b.shape and torch.allclose(a.clamp(min=-1e9), b.clamp(min=-1e9), rtol=0, atol=atol)


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
