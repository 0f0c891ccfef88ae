"""check_drafter passes what is right, needs a dtype that tells, and names what a drafter declares falsely."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_drafters import drafter_for
from torch import Tensor, nn

from aurora_rl.policies import Drafter, Eagle3Drafter, EagleDrafter, MedusaDrafter, TargetParts
from aurora_rl.testing import check_drafter, tiny_target


# In float64 and on a Llama, all registered drafters conform in tests/policies/test_drafter_conformance.py.
@pytest.mark.parametrize(
    ("kind", "architecture", "dtype"),
    [
        (Eagle3Drafter, "llama", torch.float32),
        (EagleDrafter, "llama", torch.float32),
        (MedusaDrafter, "llama", torch.float32),
        (Eagle3Drafter, "qwen3", torch.float64),
    ],
)
def test_drafters_conform_and_are_left_as_they_are_like_their_target(
    kind: type[Drafter], architecture: str, dtype: torch.dtype
) -> None:
    target = tiny_target(architecture, dtype=dtype)
    drafter = drafter_for(kind, target)
    before, model = copy.deepcopy(drafter.published()), copy.deepcopy(target.state_dict())
    check_drafter(drafter, target)
    assert all(torch.equal(tensor, before[name]) for name, tensor in drafter.published().items())
    assert all(torch.equal(tensor, model[name]) for name, tensor in target.state_dict().items())


def test_check_needs_a_dtype_that_tells_mistakes_from_rounding() -> None:
    target = tiny_target(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float64 or float32, got torch.bfloat16"):
        check_drafter(drafter_for(MedusaDrafter, target), target)


class ListsItsLayers(Eagle3Drafter):
    """Lists and tuples differ on the wire."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.feature_layers = list(self.feature_layers)


class LearnsInTheTarget(MedusaDrafter):
    """Its last head is the target's own."""

    @classmethod
    def from_target(cls, parts: TargetParts, *, draft_vocab: Tensor, **options) -> LearnsInTheTarget:
        drafter = super().from_target(parts, draft_vocab=torch.arange(len(parts.head)), **options)
        drafter.lm_heads[-1].weight = nn.Parameter(parts.head.weight)
        return drafter


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (LearnsInTheTarget, "no gradient may reach the target, and 'lm_heads.0.weight' shares its memory"),
        (ListsItsLayers, "feature_layers is no tuple of integers"),
    ],
)
def test_check_names_what_a_drafter_breaks(kind: type[Drafter], message: str) -> None:
    target = tiny_target()
    with pytest.raises(AssertionError, match=message):
        check_drafter(drafter_for(kind, target), target)
