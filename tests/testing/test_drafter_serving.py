"""check_drafter names what a drafter breaks while it drafts: its trees, its draws and its cache."""

from __future__ import annotations

import pytest
import torch
from tiny_drafters import drafter_for
from torch import Tensor

from aurora_rl.policies import Drafter, Eagle3Drafter, MedusaDrafter, Proposal, TreeShape
from aurora_rl.testing import check_drafter, tiny_target


class SaysNoDepth(MedusaDrafter):
    """It has four heads, and does not say so."""

    @property
    def max_depth(self) -> float:
        return float("inf")

    @max_depth.setter
    def max_depth(self, depth: float) -> None:
        pass


class DraftingMovesTheState(Eagle3Drafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        proposal = super().propose(slots, shape, generator)
        self._state[slots] *= 1.1
        return proposal


class TokensOutsideTheVocabulary(MedusaDrafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        proposal = super().propose(slots, shape, generator)
        return proposal._replace(tokens=proposal.tokens + 1)


class OverBudget(MedusaDrafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        return super().propose(slots, TreeShape(shape.depth, shape.width + 1) if shape.depth else shape, generator)


class SaysUniform(MedusaDrafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        proposal = super().propose(slots, shape, generator)
        uniform = None if proposal.q is None else torch.full_like(proposal.q, 1 / len(self.draft_vocab))
        return proposal._replace(q=uniform)


class HalvesItsLaw(MedusaDrafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        proposal = super().propose(slots, shape, generator)
        return proposal._replace(q=None if proposal.q is None else proposal.q / 2)


class DrawsOnItsOwn(MedusaDrafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        return super().propose(slots, shape)


class DrawsAlwaysTheSame(MedusaDrafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        return super().propose(slots, shape, torch.Generator().manual_seed(0))


class KeepsKeysWithoutValues(Eagle3Drafter):
    def cache_rows(self, slot: int) -> list[Tensor]:
        return super().cache_rows(slot)[:1]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (SaysUniform, "q of a drawn token is not exp\\(log_probs\\)"),
        (HalvesItsLaw, "a row of q does not sum to 1"),
        (DrawsOnItsOwn, "ignores the generator: one seed gave two trees"),
        (DrawsAlwaysTheSame, "draws nothing: seeds do not matter"),
        (SaysNoDepth, "a chain of 4 nodes, max_depth is inf"),
        (DraftingMovesTheState, "proposals change when asked for again"),
        (KeepsKeysWithoutValues, "proposals change when a slot takes over the rows that cache_rows gives of another"),
        (TokensOutsideTheVocabulary, "a token is outside the draft vocabulary"),
        (OverBudget, "expected \\[4, 1..1\\] nodes"),
    ],
)
def test_check_names_what_a_drafter_breaks(kind: type[Drafter], message: str) -> None:
    target = tiny_target()
    with pytest.raises(AssertionError, match=message):
        check_drafter(drafter_for(kind, target), target)
