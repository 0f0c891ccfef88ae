"""A stream of tiny trajectories to learn from, and a loss that notes what it is given."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tiny_recordings import trajectory_of
from torch import nn

from aurora_rl.objectives import ImitationLoss
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.testing import tiny_target


def drafter_and_loss() -> tuple[Eagle3Drafter, ImitationLoss]:
    """A drafter in float32 and its loss, the same at every call."""
    parts = TargetParts.of(tiny_target())
    torch.manual_seed(0)
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(16)).float()
    return drafter, ImitationLoss(drafter, parts.head.float(), steps=2)


def stream(count: int, depth: int = 3) -> list[TensorDict]:
    drafter, _ = drafter_and_loss()
    return [trajectory_of(drafter, request=i, max_new_tokens=4, shape=TreeShape(depth)) for i in range(count)]


class Seen(nn.Module):
    """A loss that notes the requests of every batch; its two values are those that it is told."""

    def __init__(self, values: tuple[float, float] = (1.0, 2.0)) -> None:
        super().__init__()
        self.weight, self.values, self.batches = nn.Parameter(torch.ones(2)), values, []

    def forward(self, batch: TensorDictBase) -> TensorDict:
        self.batches.append(batch["request"].tolist())
        first, second = self.values
        losses = {"loss_a": first * self.weight[0], "loss_b": second * self.weight[1], "metric": 7 * self.weight[0]}
        return TensorDict(losses, batch_size=[])
