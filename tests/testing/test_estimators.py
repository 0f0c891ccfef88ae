"""check_objective compares the expected gradient of an objective that learns from draws with the exact one."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor

from aurora_rl.objectives import AcceptanceRewardLoss, Objective, Values
from aurora_rl.testing import check_objective
from aurora_rl.testing.estimators import check_expected_gradient


class LearnsWhatIsRejected(AcceptanceRewardLoss):
    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        return found._replace(value=-found.value)


class RewardsEveryDraw(AcceptanceRewardLoss):
    def _credit(self, law: Any, reach: Tensor, *rest: Tensor) -> Tensor:
        return torch.ones_like(reach)


class RewardsANodeForItselfAlone(AcceptanceRewardLoss):
    def _credit(self, law: Any, reach: Tensor, *rest: Tensor) -> Tensor:
        return reach


class TrustsTheAcceptBits(AcceptanceRewardLoss):
    """As if no rule looked at the drafter's distribution."""

    def _law(self, batch: TensorDictBase) -> Any:
        law = super()._law(batch)
        law.needs_q = torch.zeros_like(law.needs_q)
        return law


class ScalesByTheTemperature(AcceptanceRewardLoss):
    """And so learns nothing from what was decoded greedily."""

    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        return found._replace(value=found.value * batch["sampling", "temperature"].max())


class TakesAllAsDrawnWithReplacement(AcceptanceRewardLoss):
    def values(self, batch: TensorDictBase) -> Values:
        batch = batch.clone()
        batch["sampling", "draft_mode"] = torch.ones_like(batch["sampling", "draft_mode"])
        return super().values(batch)


@pytest.mark.parametrize(
    ("mutant", "settings", "what"),
    [
        (LearnsWhatIsRejected, {}, "trees (-1, 0) served by sample_and_match"),
        (RewardsEveryDraw, {}, "trees (-1, 0) served by sample_and_match"),
        (RewardsANodeForItselfAlone, {}, "trees (-1, 0) served by sample_and_match"),
        (ScalesByTheTemperature, {}, "trees (-1, 0) served by greedy"),
        (TrustsTheAcceptBits, {"reward": "recorded"}, "trees (-1, 0) served by rejection"),
        (TakesAllAsDrawnWithReplacement, {}, "trees (-1, -1, 0) served by rejection_without_replacement"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_the_check_catches_a_policy_gradient(mutant: type[Objective], settings: dict[str, Any], what: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(f"{what}: minus the expected gradient has a cosine of ")):
        check_expected_gradient(partial(mutant, **settings), unbiased=True, seed=0)


def test_a_bias_has_to_be_declared_and_may_not_lead_away() -> None:
    settings = {"baseline": "group"}
    with pytest.raises(AssertionError, match=re.escape("of the expected number of accepted nodes, not 1")):
        check_objective(partial(AcceptanceRewardLoss, **settings))
    with pytest.raises(AssertionError, match=re.escape("of the expected number of accepted nodes, not a positive one")):
        check_objective(partial(LearnsWhatIsRejected, **settings), unbiased=False)


class RefusesTables(AcceptanceRewardLoss):
    def values(self, batch: TensorDictBase) -> Values:
        if batch["sequence", "features"].shape[1] > 1:
            return super().values(batch)
        raise ValueError("objective 'acceptance_reward' needs features of width 2 or more")


def test_not_everything_may_be_refused() -> None:
    with pytest.raises(AssertionError, match="every rule is refused"):
        check_expected_gradient(RefusesTables, unbiased=True, seed=0)
