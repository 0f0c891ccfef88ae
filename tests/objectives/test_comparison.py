"""Divergences by chunks of rows: every objective's result is that of whole logits, which are not made."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from tensor_sizes import largest_tensor
from tensordict import TensorDict
from tiny_drafters import noisy_drafter_and_head
from tiny_recordings import trajectory_of
from torch import Tensor, nn
from whole_logits import with_whole_logits

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
    MedusaDrafter,
    StandaloneDrafter,
    TreeShape,
)
from aurora_rl.trajectories import pack, rule_code
from aurora_rl.tree_index import TreeIndex

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
    + [(kind, *each) for kind in (EagleDrafter, DFlashDrafter, StandaloneDrafter) for each in (LOSSES[0], LOSSES[4])]
    + [(MedusaDrafter, *each) for each in LOSSES],
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
        monkeypatch.setattr(drafter, name, with_whole_logits(getattr(drafter, name)))
    expected, wanted = learn(loss(drafter, head, **settings), batch)
    assert multiplied
    torch.testing.assert_close(out.to_dict(), expected.to_dict())
    assert len(gradients) == len(wanted) > 0
    for got, each in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, each)


@pytest.mark.parametrize(("loss", "settings"), LOSSES, ids=str)
def test_nothing_has_a_row_of_the_targets_vocabulary_for_every_position(
    loss: type[Objective], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, head = noisy_drafter_and_head(Eagle3Drafter)
    batch = batch_of(Eagle3Drafter)
    monkeypatch.setattr(kernel_rows, "_FEWEST", 1)
    monkeypatch.setattr(kernel_rows, "_ENOUGH", 1)
    monkeypatch.setitem(kernel_rows._CHUNK, "cpu", 1)
    wide = nn.functional.pad(head.weight, (0, 0, 0, 5000))
    rows = len(batch["nodes", "hidden"]) if loss is DiscardSamplingLoss else len(batch["sequence", "hidden"])
    assert (
        largest_tensor(lambda: learn(loss(drafter, TargetHead(wide), **settings), batch)) <= wide.numel() < 5000 * rows
    )


@pytest.mark.parametrize("kind", [Eagle3Drafter, MedusaDrafter])
@pytest.mark.parametrize(("loss", "settings"), LOSSES, ids=str)
def test_nothing_has_a_row_of_the_draft_vocabulary_for_every_position(
    kind: type[Drafter], loss: type[Objective], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, head = noisy_drafter_and_head(kind)
    batch = batch_of(kind)
    monkeypatch.setattr(kernel_rows, "_FEWEST", 8)
    monkeypatch.setattr(kernel_rows, "_ENOUGH", 8)
    monkeypatch.setitem(kernel_rows._CHUNK, "cpu", 1)
    # So many draft rows that logits would be the largest tensors.
    drafter.draft_vocab = torch.arange(4096)
    wide = nn.functional.pad(head.weight, (0, 0, 0, 4096 - len(head)))
    if isinstance(drafter, MedusaDrafter):
        heads = [nn.Linear(16, 4096, bias=False, dtype=torch.float64) for _ in range(drafter.num_heads)]
        drafter.lm_heads = nn.ModuleList(heads)
    else:
        drafter.lm_head = nn.Linear(16, 4096, bias=False, dtype=torch.float64)
    logits = drafter.context_logits(batch, trees := TreeIndex.of(batch), torch.ones_like(trees.depth).bool())
    assert isinstance(logits, HeadLogits) and len(logits.states) > 16
    size = largest_tensor(lambda: learn(loss(drafter, TargetHead(wide), **settings), batch))
    assert size == 4096 * 16  # of a head, or its gradient


def test_rows_with_heads_of_their_own_are_compared_as_with_whole_logits() -> None:
    """In any order, with rows that do not count, choices of their own, and a head that has no row."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states, weights = randn(9, 4).requires_grad_(), [randn(7, 4).requires_grad_() for _ in range(4)]
    head_of, target = torch.tensor([2, 0, 3, 0, 2, 3, 3, 0, 2]), LogProbTarget(randn(9, 7).log_softmax(-1))
    row_weights, upstream = torch.rand(1, 9, generator=generator, dtype=torch.float64), randn(1, 9)
    row_weights[0, 4] = 0.0
    choices = torch.tensor([0, 6, -1, 2, 3, 3, 1, 0, 5])
    found = []
    for plain_logits in (False, True):
        for direction in (2 * row_weights, upstream):  # as was foreseen, and not
            logits = HeadLogits(states, weights, head_of)
            logits = logits + 0 if plain_logits else logits
            values, agreement = compare(
                [logits], target, forward_kl,
                draft_vocab=None, renormalize=True, row_weights=row_weights, choices=choices,
            )  # fmt: skip
            keep = row_weights != 0
            loss = (torch.where(keep, values, 0.0) * direction).sum()
            found.append([values[keep], agreement[keep], *torch.autograd.grad(loss, (states, *weights))])
    torch.testing.assert_close(found[:2], found[2:])


def test_values_by_hand() -> None:
    half = math.log(0.5)
    target = LogProbTarget(torch.tensor([[half, half, -1e9], [0.0, -1e9, -1e9]]).log_softmax(-1))
    logits = [torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0], [5.0, 0.0, 0.0]])]
    divergence, agreement = compare(logits, target, forward_kl, draft_vocab=None, renormalize=False)
    assert divergence[0, 0].item() == pytest.approx(math.log(3) - math.log(2))  # uniform over 2 against over 3
    assert divergence[0, 1].item() == pytest.approx(math.log(math.exp(1) + math.exp(2) + 1) - 1)
    assert agreement.tolist() == [[True, False], [False, True]]


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
    for results in found[1:]:
        torch.testing.assert_close(found[0], results)
