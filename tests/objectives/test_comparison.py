"""Divergences by chunks of rows: every objective's result is that of whole logits, which are not made."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tensor_sizes import largest_tensor
from tensordict import TensorDict
from tiny_drafters import noisy_drafter_and_head
from tiny_recordings import trajectory_of
from torch import Tensor, nn

from aurora_kernels import LogProbTarget
from aurora_kernels import rows as kernel_rows
from aurora_rl.envs import SamplingParams
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import DiscardSamplingLoss, ExpectedLengthLoss, Objective, forward_kl
from aurora_rl.objectives.comparison import compare
from aurora_rl.policies import (
    DFlashDrafter,
    Drafter,
    Eagle3Drafter,
    EagleDrafter,
    HeadLogits,
    StandaloneDrafter,
    TreeShape,
)
from aurora_rl.trajectories import pack, rule_code

WARPED = SamplingParams(temperature=0.7, top_p=0.9)


@cache
def batch_of(kind: type[Drafter]) -> TensorDict:
    drafter, _ = noisy_drafter_and_head(kind)
    served = [("rejection", WARPED), ("greedy", SamplingParams()), ("sample_and_match", WARPED)]
    batch = pack([
        trajectory_of(drafter, sampling_params=how, shape=TreeShape(3, 2), request=i)
        for i, (_, how) in enumerate(served)
    ])  # fmt: skip
    batch["sampling", "rule"] = torch.tensor([rule_code(rule) for rule, _ in served])
    return batch


def learn(loss: Objective, batch: TensorDict) -> tuple[TensorDict, list[Tensor]]:
    out = loss(batch)
    loss.drafter.zero_grad()
    out[f"loss_{loss.name}"].sum().backward()
    return out, [p.grad.clone() for p in loss.drafter.parameters() if p.grad is not None]


LOSSES: list[tuple[type[Objective], dict[str, Any]]] = [
    (DiscardSamplingLoss, {}),
    (DiscardSamplingLoss, {"weighting": "reach", "divergence": "total_variation"}),
    (DiscardSamplingLoss, {"top_k": 5, "reduction": "none"}),
    (DiscardSamplingLoss, {"target": "served", "weighting": "decay"}),
    (ExpectedLengthLoss, {"steps": 3}),
    (ExpectedLengthLoss, {"steps": 3, "rule": "rejection"}),
    (ExpectedLengthLoss, {"contexts": "trees", "reduction": "sum"}),
]


@pytest.mark.parametrize(
    ("kind", "loss", "settings"),
    [(Eagle3Drafter, *each) for each in LOSSES]
    + [(kind, *each) for kind in (EagleDrafter, DFlashDrafter, StandaloneDrafter) for each in (LOSSES[0], LOSSES[4])],
    ids=str,
)
def test_it_is_what_it_is_with_whole_logits(
    kind: type[Drafter], loss: type[Objective], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, head = noisy_drafter_and_head(kind)
    batch, multiplied = batch_of(kind), []
    product = HeadLogits.product.func  # type: ignore[attr-defined]
    monkeypatch.setattr(HeadLogits, "product", property(lambda logits: multiplied.append(1) or product(logits)))
    out, gradients = learn(loss(drafter, head, **settings), batch)
    assert not multiplied, "whole logits were made"
    for name in ("unroll", "context_logits"):  # of plain logits
        monkeypatch.setattr(drafter, name, plain(getattr(drafter, name)))
    expected, wanted = learn(loss(drafter, head, **settings), batch)
    assert multiplied
    torch.testing.assert_close(out.to_dict(), expected.to_dict())
    assert len(gradients) == len(wanted) > 0
    for got, each in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, each)


def plain(function: Any) -> Any:
    def with_plain_logits(*args: Any) -> Any:
        found = function(*args)
        return found + 0 if isinstance(found, Tensor) else found._replace(logits=[each + 0 for each in found.logits])

    return with_plain_logits


@pytest.mark.parametrize(("loss", "settings"), LOSSES, ids=str)
def test_nothing_has_a_row_of_the_targets_vocabulary_for_every_position(
    loss: type[Objective], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, head = noisy_drafter_and_head(Eagle3Drafter)
    batch = batch_of(Eagle3Drafter)
    monkeypatch.setattr(kernel_rows, "_FEWEST", 1)
    monkeypatch.setitem(kernel_rows._CHUNK, "cpu", 1)
    wide = nn.functional.pad(head.weight, (0, 0, 0, 5000))
    rows = len(batch["nodes", "hidden"]) if loss is DiscardSamplingLoss else len(batch["sequence", "hidden"])
    assert (
        largest_tensor(lambda: learn(loss(drafter, TargetHead(wide), **settings), batch)) <= wide.numel() < 5000 * rows
    )


def test_steps_that_predict_alike_are_compared_once_and_have_the_gradients_of_each() -> None:
    states, head = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(7, 4, dtype=torch.float64)
    head.requires_grad_()
    target = LogProbTarget(torch.randn(5, 7, dtype=torch.float64).log_softmax(-1))
    weights = torch.rand(3, 5, dtype=torch.float64)
    weights[0, 2] = weights[1, 2] = weights[2, 2] = 0.0
    found = []
    for logits in ([HeadLogits(states, head)] * 3, [states @ head.T] * 3, [states @ head.T for _ in range(3)]):
        values, agreement = compare(
            logits, target, forward_kl, draft_vocab=None, renormalize=True, row_weights=weights
        )  # fmt: skip
        keep = weights != 0
        loss = (torch.where(keep, values, 0.0) * weights).sum()
        found.append([values[keep], agreement[keep], *torch.autograd.grad(loss, (states, head))])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)
