"""check_objective names what an objective breaks: one mutant, or more, for each of its promises."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from aurora_kernels import Target, TopKTarget
from aurora_kernels.trees import sibling_ranks
from aurora_rl.objectives import (
    DiscardSamplingLoss,
    ExpectedLengthLoss,
    ImitationLoss,
    Objective,
    Values,
    Windows,
    forward_kl,
)
from aurora_rl.objectives.served_target import ServedTarget
from aurora_rl.testing import check_objective

TEMPERATURE, ACCEPTED = ("sampling", "temperature"), ("nodes", "accepted")


def check(kind: type[Objective], *, settings: dict[str, Any] | None = None, **declared: bool) -> None:
    check_objective(
        lambda drafter, head, reduction: kind(drafter, head, reduction=reduction, **(settings or {})), **declared
    )


def of_tokens(batch: TensorDictBase, of_requests: Tensor) -> Tensor:
    """``[C]``, of the completion tokens, from a value of every request."""
    return of_requests.repeat_interleave(batch["sequence", "offset"].diff() - batch["sequence", "prompt_length"])


# ---- what it takes --------------------------------------------------------------------------------------------------


def scaled_kl(log_p: Tensor, log_q: Tensor, windows: Windows, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return scale * forward_kl(log_p, log_q), windows.valid


def follows_the_contrary(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    return -forward_kl(log_p, log_q), windows.valid


@pytest.mark.parametrize(
    "objective",
    [
        *("imitation", "aurora_rl.objectives:ImitationLoss", "objective_functions:plain_kl", ImitationLoss),
        *(partial(ImitationLoss, steps=2), scaled_kl, partial(scaled_kl, scale=2.0)),
    ],
    ids=lambda objective: re.sub(" at 0x[0-9a-f]+", "", str(objective)),
)
def test_an_objective_is_named_as_elsewhere(objective: Any) -> None:
    check_objective(objective)


def test_a_function_is_checked_as_any_objective() -> None:
    with pytest.raises(AssertionError, match="it does not lead to the target"):
        check_objective(follows_the_contrary)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("imitatoin", "no objective is called 'imitatoin'; did you mean 'imitation'"),
        (7, "an objective is its name, .* got 7"),
        (dict, "an objective is its name, .* got <class 'dict'>"),
        (lambda p, q, windows, floor=0.1: None, r"take \(log_p, .*; settings are keyword-only: put \* before 'floor'$"),
        (lambda drafter, head: None, r"must take \(log_p, log_q, windows, \*, settings\), got <lambda>\(drafter, head"),
        (partial(scaled_kl, size=2), "size"),
    ],
)
def test_what_is_none_is_refused_in_a_line(objective: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        check_objective(objective)
    assert "\n" not in str(caught.value)


# ---- what forward gives and reads -----------------------------------------------------------------------------------


class ChangesItsInput(ImitationLoss):
    def values(self, batch: TensorDictBase) -> Values:
        batch["sequence", "features"].mul_(1.5)
        return super().values(batch)


class CallsItsLossOtherwise(ImitationLoss):
    @property
    def out_keys(self) -> list[NestedKey]:
        return ["loss_other", *self.metrics]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        return super().forward(tensordict).rename_key_("loss_imitation", "loss_other")


class ReportsWhatItDoesNotGive(ImitationLoss):
    @property
    def metrics(self) -> list[str]:
        return ["agreement", "temperature"]


class DividesByTheTemperature(ImitationLoss):
    @property
    def reads(self) -> list[NestedKey]:
        return [*super().reads, TEMPERATURE]

    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        return found._replace(weight=found.weight / of_tokens(batch, batch[TEMPERATURE]))


class DropsItsGraph(ImitationLoss):
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        return super().forward(tensordict).detach()


class KeepsTheMeanOfEveryStep(ImitationLoss):
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        out = super().forward(tensordict)
        return out.set("loss_imitation", out["loss_imitation"].expand(3))


class NamesWhatNoBatchHas(ImitationLoss):
    @property
    def reads(self) -> list[NestedKey]:
        return [*super().reads, *self.optional_reads]

    @property
    def optional_reads(self) -> list[NestedKey]:
        return [("sequence", "colour")]


class ForgetsAKey(ImitationLoss):
    @property
    def reads(self) -> list[NestedKey]:
        return [key for key in super().reads if key != ("sequence", "prompt_length")]


class TakesWhatItFinds(ImitationLoss):
    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        return found._replace(weight=found.weight * (2 if ACCEPTED in batch.keys(True) else 1))


class IgnoresTheTemperature(ExpectedLengthLoss):
    def served_target(
        self, batch: TensorDictBase, rows: TensorDictBase, request: Tensor, *, greedy: bool = False, fill: bool = False
    ) -> ServedTarget:
        batch = batch.clone()
        batch[TEMPERATURE] = torch.ones_like(batch[TEMPERATURE])
        return super().served_target(batch, rows, request, greedy=greedy, fill=fill)


# ---- positions that do not count ------------------------------------------------------------------------------------


class CountsEveryPosition(ImitationLoss):
    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        return found._replace(valid=torch.ones_like(found.valid))


class NormalisesOverPositions(ImitationLoss):
    """What it adds is zero, and its gradient is not."""

    def values(self, batch: TensorDictBase) -> Values:
        found, last = super().values(batch), self.drafter.unroll(batch, self.steps).logits[-1]
        spread = last.logsumexp(0).mean()
        return found._replace(value=found.value + spread - spread.detach())


class ReportsEveryPosition(ImitationLoss):
    """Its loss is right, its metric reads what is not predicted."""

    def values(self, batch: TensorDictBase) -> Values:
        logits = self.drafter.unroll(batch, self.steps).logits
        return super().values(batch)._replace(metrics={"agreement": torch.stack([step.mean() for step in logits])})


# ---- gradients and sums ---------------------------------------------------------------------------------------------


class TrainsTheHead(ImitationLoss):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.head.weight.requires_grad_()


class LearnsNothing(ImitationLoss):
    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        return found._replace(value=torch.ones_like(found.value))


class DetachesHalf(ImitationLoss):
    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        return found._replace(value=0.5 * found.value + 0.5 * found.value.detach())


class HalvesItsSum(ImitationLoss):
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        out = super().forward(tensordict)
        return out.set("loss_imitation", out["loss_imitation"] * (0.5 if self.reduction == "sum" else 1))


class AveragesOverEveryPosition(ImitationLoss):
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        out = super().forward(tensordict)
        if self.reduction == "mean":
            value, weight, valid, _ = self.values(tensordict)
            out["loss_imitation"] = torch.where(valid, value * weight, 0.0).mean(1).sum()
        return out


class ReadsItsNeighbours(ImitationLoss):
    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        return found._replace(value=found.value + 0.1 * torch.where(found.valid, found.value, 0.0).roll(1, 1))


class TakesRequestsForPlaces(ImitationLoss):
    """Right while requests are numbered in their order."""

    @property
    def reads(self) -> list[NestedKey]:
        return [*super().reads, "request"]

    def values(self, batch: TensorDictBase) -> Values:
        found, request = super().values(batch), batch["request"]
        prompt = batch["sequence", "prompt_length"][request - request[0]]
        return found._replace(weight=found.weight * of_tokens(batch, prompt))


class TrustsTheFirstSibling(DiscardSamplingLoss):
    def _weights(self, batch: TensorDictBase, trees: Any) -> Tensor:
        return 1 / (1 + sibling_ranks(trees.parent).double())


# ---- the extremes of acceptance -------------------------------------------------------------------------------------


class MindsTheAcceptBits(ImitationLoss):
    """Does as it should unless all bits of several requests are the same."""

    @property
    def reads(self) -> list[NestedKey]:
        return [*super().reads, ACCEPTED]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        out = super().forward(tensordict)
        if len(tensordict["sequence", "prompt_length"]) > 1:
            out["loss_imitation"] = self.scaled(out["loss_imitation"], tensordict[ACCEPTED])
        return out

    def scaled(self, loss: Tensor, accepted: Tensor) -> Tensor:
        raise NotImplementedError


class DividesByWhetherAnyIsAccepted(MindsTheAcceptBits):
    def scaled(self, loss: Tensor, accepted: Tensor) -> Tensor:
        return loss / accepted.any()


class DividesByWhetherAnyIsRejected(MindsTheAcceptBits):
    def scaled(self, loss: Tensor, accepted: Tensor) -> Tensor:
        return loss / (~accepted).any()


class TakesARootWhereNoneIsRejected(MindsTheAcceptBits):
    """Of zero, whose gradient is infinite."""

    def scaled(self, loss: Tensor, accepted: Tensor) -> Tensor:
        return loss + (loss - loss.detach()).sqrt() if accepted.all() else loss


# ---- the target's likeliest tokens ----------------------------------------------------------------------------------


class TrustsTheLikeliest(ImitationLoss):
    """Reads one form rightly and the other wrongly."""

    def target_law(self, batch: TensorDictBase, rows: TensorDictBase, request: Tensor) -> tuple[Target, Tensor]:
        law, covered = super().target_law(batch, rows, request)
        return (replace(law, log_probs=1.1 * law.log_probs) if isinstance(law, TopKTarget) else law), covered


class ForgetsTheTail(ImitationLoss):
    def keys_of(self, batch: TensorDictBase) -> list[NestedKey]:
        return [key for key in super().keys_of(batch) if key[-1] != "tail_log_prob"]


class KnowsHiddenStatesOnly(ImitationLoss):
    refusal: Exception = ValueError("objective 'imitation' needs ('sequence', 'hidden')")

    def values(self, batch: TensorDictBase) -> Values:
        if self.tensor_keys.hidden not in batch.keys(True):
            raise self.refusal
        found = super().values(batch)
        return found._replace(weight=found.weight * batch[self.tensor_keys.hidden].norm(dim=-1))


def test_an_objective_may_know_one_form_only() -> None:
    check(KnowsHiddenStatesOnly)


@pytest.mark.parametrize(
    "refusal",
    [
        KeyError("objective 'imitation' needs ('sequence', 'hidden')"),
        ValueError("there is no ('sequence', 'hidden')"),
        ValueError("objective 'imitation' cannot learn from this"),
    ],
    ids=repr,
)
def test_it_has_to_say_so(refusal: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KnowsHiddenStatesOnly, "refusal", refusal)
    message = f"likeliest tokens ends in {refusal!r}, and not in a ValueError that names 'imitation' and hidden"
    with pytest.raises(AssertionError, match=re.escape(message)):
        check(KnowsHiddenStatesOnly)


class RefusesRejectionWithoutAWord(ImitationLoss):
    @property
    def reads(self) -> list[NestedKey]:
        return [*super().reads, ("sampling", "rule")]

    def values(self, batch: TensorDictBase) -> Values:
        if bool((batch["sampling", "rule"] > 1).any()):
            raise ValueError("no")
        return super().values(batch)


# ---- where it leads -------------------------------------------------------------------------------------------------


class LeadsAway(ImitationLoss):
    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        return found._replace(value=-found.value)


class LeadsAwayAfterTheFirstStep(ImitationLoss):
    """By less than the first step leads there."""

    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        return found._replace(value=torch.cat([found.value[:1], -0.2 * found.value[1:]]))


class Spread(ImitationLoss):
    """A regulariser: how far the drafter is from an even law."""

    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        logits = torch.stack(self.drafter.unroll(batch, self.steps).logits)
        return found._replace(value=-logits.log_softmax(-1).mean(-1))


def test_a_term_of_a_sum_need_not_lead_to_the_target() -> None:
    check(Spread, leads=False)
    with pytest.raises(AssertionError, match="it does not lead to the target"):
        check(Spread)


@pytest.mark.parametrize(
    ("mutant", "promise"),
    [
        (ChangesItsInput, "forward changes its input"),
        (CallsItsLossOtherwise, "forward returns no 'loss_imitation'"),
        (ReportsWhatItDoesNotGive, "out_keys are ['loss_imitation', 'agreement', 'temperature'], forward gave"),
        (DividesByTheTemperature, "loss_imitation is not finite (served by greedy at temperature 0.0)"),
        (DropsItsGraph, "loss_imitation: losses carry gradients and metrics do not"),
        (KeepsTheMeanOfEveryStep, "the mean of a loss is not a scalar"),
        (NamesWhatNoBatchHas, "in_keys name [('sequence', 'colour')], which no batch has"),
        (ForgetsAKey, "in_keys miss an entry that is read"),
        (TakesWhatItFinds, "in_keys miss entries that count"),
        (IgnoresTheTemperature, "in_keys name ('sampling', 'temperature'), and nothing changes with it"),
        (CountsEveryPosition, "the loss depends on what stands where the drafter has no prediction"),
        (NormalisesOverPositions, "the gradient depends on what stands where the drafter has no prediction"),
        (TrainsTheHead, "the target's head would learn"),
        (LearnsNothing, "no gradient reaches the drafter"),
        (DetachesHalf, "finite differences give"),
        (HalvesItsSum, "the values of 'none' do not add up to 'sum'"),
        (ReadsItsNeighbours, "a trajectory counts differently alone and next to others: padding is read"),
        (TakesRequestsForPlaces, "the order of the trajectories matters"),
        (TrustsTheFirstSibling, "the order of siblings matters, under a rule to which it does not"),
        (DividesByWhetherAnyIsAccepted, "the loss is inf where nothing was accepted"),
        (DividesByWhetherAnyIsRejected, "the loss is inf where every node was accepted"),
        (TakesARootWhereNoneIsRejected, "a gradient is not finite where every node was accepted"),
        (TrustsTheLikeliest, "the target's likeliest tokens and its hidden states give different losses"),
        (ForgetsTheTail, "keys_of a batch with the likeliest tokens miss an entry that is read"),
        (RefusesRejectionWithoutAWord, "a batch served by rejection at temperature 0.7 ends in ValueError('no')"),
        (ReportsEveryPosition, "the metric 'agreement' depends on what stands where the drafter has no prediction"),
        (AveragesOverEveryPosition, "'mean' is not the mean of each group over its valid positions"),
        (LeadsAway, "it does not lead to the target"),
        (LeadsAwayAfterTheFirstStep, "in group 1"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_the_check_catches(mutant: type[Objective], promise: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(promise)):
        check(mutant)
