"""Drafters of tiny targets, which predict every other token of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aurora_rl.policies import Drafter, Eagle3Drafter, TargetParts
from aurora_rl.testing import tiny_target


def drafter_for(kind: type[Drafter], target: PreTrainedModel) -> Drafter:
    """A drafter of `tiny_target`, the same at every call; half of the tokens are outside its vocabulary."""
    torch.manual_seed(0)
    return kind.from_target(TargetParts.of(target), draft_vocab=torch.arange(0, 32, 2)).to(target.dtype)


def eagle3_and_head() -> tuple[Drafter, Tensor]:
    """An EAGLE-3 drafter in float64 and the output head of its target, the same at every call."""
    target = tiny_target()
    return drafter_for(Eagle3Drafter, target), TargetParts.of(target).head
