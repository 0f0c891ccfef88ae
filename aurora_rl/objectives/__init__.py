"""What the drafter learns: divergences, losses, and how they are named and summed."""

from aurora_rl.objectives.acceptance_reward import AcceptanceRewardLoss
from aurora_rl.objectives.discard import DiscardSamplingLoss
from aurora_rl.objectives.divergences import DIVERGENCES, Divergence, overlap
from aurora_rl.objectives.expected_length import ExpectedLengthLoss
from aurora_rl.objectives.imitation import ImitationLoss, ImitationValues, imitation
from aurora_rl.objectives.objective import Objective, Values
from aurora_rl.objectives.registry import (
    OBJECTIVES,
    check_settings,
    get_objective,
    make_objectives,
    register_objective,
)
from aurora_rl.objectives.sum_loss import SumLoss
from aurora_rl.objectives.target_rows import context_rows, target_logits, target_rows

__all__ = [
    "DIVERGENCES",
    "OBJECTIVES",
    "AcceptanceRewardLoss",
    "DiscardSamplingLoss",
    "Divergence",
    "ExpectedLengthLoss",
    "ImitationLoss",
    "ImitationValues",
    "Objective",
    "SumLoss",
    "Values",
    "check_settings",
    "context_rows",
    "get_objective",
    "imitation",
    "make_objectives",
    "overlap",
    "register_objective",
    "target_logits",
    "target_rows",
]
