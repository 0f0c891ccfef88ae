"""Objectives of the drafter: divergences, losses, and how they are named and summed."""

from aurora_rl.objectives.acceptance_reward import AcceptanceRewardLoss
from aurora_rl.objectives.discard import DiscardSamplingLoss
from aurora_rl.objectives.divergences import (
    DIVERGENCES,
    Divergence,
    forward_kl,
    get_divergence,
    overlap,
    register_divergence,
)
from aurora_rl.objectives.expected_length import ExpectedLengthLoss
from aurora_rl.objectives.function_objective import FunctionObjective
from aurora_rl.objectives.imitation import ImitationLoss
from aurora_rl.objectives.objective import Objective, Values
from aurora_rl.objectives.registry import OBJECTIVES, check_settings, get_objective, make_objectives, register_objective
from aurora_rl.objectives.sum_loss import SumLoss
from aurora_rl.objectives.target_rows import context_rows, target_logits, target_rows
from aurora_rl.objectives.windows import Windows

__all__ = [
    "DIVERGENCES",
    "OBJECTIVES",
    "AcceptanceRewardLoss",
    "DiscardSamplingLoss",
    "Divergence",
    "ExpectedLengthLoss",
    "FunctionObjective",
    "ImitationLoss",
    "Objective",
    "SumLoss",
    "Values",
    "Windows",
    "check_settings",
    "context_rows",
    "forward_kl",
    "get_divergence",
    "get_objective",
    "make_objectives",
    "overlap",
    "register_divergence",
    "register_objective",
    "target_logits",
    "target_rows",
]
