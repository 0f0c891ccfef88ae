"""Drafters of tiny targets, which predict every other token of the vocabulary."""

from __future__ import annotations

import copy
from functools import cache

import torch
from transformers import PreTrainedModel

from aurora_rl.models.target_head import TargetHead
from aurora_rl.policies import Drafter, Eagle3Drafter, StandaloneDrafter, TargetParts
from aurora_rl.testing import tiny_target


def drafter_for(kind: type[Drafter], target: PreTrainedModel) -> Drafter:
    """A drafter of `tiny_target`, the same at every call.

    Half of the tokens are outside its vocabulary, but for a standalone one, which has those of its model.
    """
    torch.manual_seed(0)
    draft_vocab = torch.arange(0, 32, 1 if kind is StandaloneDrafter else 2)
    return kind.from_target(TargetParts.of(target), draft_vocab=draft_vocab).to(target.dtype)


def eagle3_and_head() -> tuple[Drafter, TargetHead]:
    """An EAGLE-3 drafter in float64 and the output head of its target, the same at every call."""
    return copy.deepcopy(_made(Eagle3Drafter, 0.0))


def noisy_drafter_and_head(kind: type[Drafter] = Eagle3Drafter) -> tuple[Drafter, TargetHead]:
    """The same of any kind, with noise on its weights: parts that start at zero would hide what they do."""
    return copy.deepcopy(_made(kind, 0.05))


@cache
def _made(kind: type[Drafter], noise: float) -> tuple[Drafter, TargetHead]:
    target = tiny_target()
    drafter = drafter_for(kind, target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += noise * torch.randn_like(parameter)
    return drafter, TargetParts.of(target).head
