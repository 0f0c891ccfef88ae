"""What the drafter learns: divergences and losses."""

from aurora_rl.objectives.divergences import forward_kl
from aurora_rl.objectives.imitation import ImitationLoss, ImitationValues, imitation

__all__ = ["ImitationLoss", "ImitationValues", "forward_kl", "imitation"]
