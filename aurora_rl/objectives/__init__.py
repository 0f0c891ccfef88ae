"""What the drafter learns: divergences and losses."""

from aurora_rl.objectives.divergences import DIVERGENCES, Divergence, overlap
from aurora_rl.objectives.imitation import ImitationLoss, ImitationValues, imitation

__all__ = ["DIVERGENCES", "Divergence", "ImitationLoss", "ImitationValues", "imitation", "overlap"]
