"""What the checks of objectives read off one: its loss, and whether it refuses a batch in words."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.objectives import Objective
from aurora_rl.testing.asserts import require


def total_loss(objective: Objective, batch: TensorDict) -> Tensor:
    """All that the objective minimises on a batch, as a scalar."""
    return torch.stack([value.sum() for key, value in objective(batch).items() if key.startswith("loss_")]).sum()


def refuses(objective: Objective, batch: TensorDict, what: str, *, naming: str = "") -> bool:
    """Whether the objective cannot learn from a batch and says so.

    Args:
        objective: Objective to ask.
        batch: Packed trajectories.
        what: The batch, in words.
        naming: What a refusal has to name in addition to the objective.

    Raises:
        AssertionError: The error is of another kind, or of other words, than those who read it need.
    """
    try:
        objective(batch)
    except (KeyError, ValueError) as error:
        told = isinstance(error, ValueError) and repr(objective.name) in str(error) and naming in str(error)
        needed = f"{objective.name!r}{f' and {naming}' if naming else ''}"
        require(told, f"{what} ends in {error!r}, and not in a ValueError that names {needed}")
        return True
    return False
